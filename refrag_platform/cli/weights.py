"""`refrag weights`: a trained model as what it changes of the packaged weights, small enough for Git, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refrag_platform.cli.options import find_project
from refrag_platform.files import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from refrag_platform.artifacts.manifest import Manifest
    from refrag_platform.compact.record import Earlier
    from refrag_platform.recipes import Recipe

Model = Annotated[str, typer.Option("--model", "-m", help="The model, e.g. smollm2-135m: its recipe names the base.")]
Mib = float

commands = typer.Typer(name="weights", no_args_is_help=True, help="Trained weights in few bytes, and back.")


@commands.command("pack")
def pack_weights(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Default: models/NAME/release.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="The trained model folder. Default: the fine-tuned one; give CPT's for pipelines to start from."
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Folder of its policy. Default: the pipeline's, or what --folder holds.")
    ] = None,
    controls: Annotated[Path | None, typer.Option(help="Folder of tuned controls to take along, as adapters.")] = None,
    encoder_bits: Annotated[int, typer.Option(min=1, max=8, help="Of each weight of encoder and projection.")] = 4,
    encoder_mib: Annotated[
        Mib,
        typer.Option(
            min=0, help="MiB of low-rank factors, of an encoder that copies the decoder's layers; no more is kept."
        ),
    ] = 4,
    decoder_bits: Annotated[
        int, typer.Option(min=0, max=8, help="Of each weight of the decoder's change; 0: low-rank factors alone.")
    ] = 1,
    decoder_mib: Annotated[Mib, typer.Option(min=0, help="MiB of low-rank factors of the decoder's change.")] = 0,
    control_mib: Annotated[Mib, typer.Option(min=0, help="MiB of low-rank factors of each control's.")] = 0.5,
    results: Annotated[
        list[Path] | None, typer.Option(help="JSON of `refrag evaluate` for the model card; again for more.")
    ] = None,
    training: Annotated[
        list[str] | None,
        typer.Option(
            help="STAGE=FILE: training.json, or a run's summary.json, of a stage that was trained elsewhere; again for "
            "more. Default: those trained here."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A line on what was trained on, for the model card; again for more. Default: the recipe's sources."
        ),
    ] = None,
    terms: Annotated[
        Path | None, typer.Option(help="Text file on the training data's sources and licences, for NOTICE.")
    ] = None,
    limit_mib: Annotated[Mib, typer.Option(min=0, help="All files together.")] = 24,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the folder --out if it is there.")] = False,
) -> None:
    """Pack a model: what training changed of the packaged weights, with the policy and the controls' adapters.

    Evaluate what `refrag weights unpack` makes of it: bits cost quality.
    """
    from refrag_platform.compact.coding import MIB, Coding
    from refrag_platform.compact.packing import Codings, pack
    from refrag_platform.evaluation.decoders import control_folders
    from refrag_platform.evaluation.scoring import PLAIN_SYSTEMS
    from refrag_platform.model.loading import model_folder

    recipe, base = _recipe(model)
    stages = [] if folder else _stage_manifests(model)
    codings = Codings(
        encoder=Coding(encoder_bits),
        decoder=Coding(decoder_bits, int(decoder_mib * MIB)),
        controls=Coding(0, int(control_mib * MIB)),
        encoder_layers=Coding(0, int(encoder_mib * MIB)),
    )
    manifest = pack(
        model_folder(str(folder or model)),
        recipe,
        base,
        out or base / "release",
        codings,
        {str(kind): path for kind, path in control_folders(controls, PLAIN_SYSTEMS).items()} if controls else {},
        stages=stages,
        results=[_report(path) for path in results or []],
        training=_figures(training or []),
        data=data or [],
        terms=terms.read_text(encoding="utf-8") if terms else "",
        limit=int(limit_mib * MIB),
        replace=replace,
        policy=policy,
        earlier=_earlier(stages),
    )
    for name, facts in manifest["files"].items():
        error = manifest["relative_errors"].get(name)
        missed = "" if error is None else f", {error:.1%} of the change missed"
        typer.echo(f"{name}: {facts['bytes'] / MIB:.2f} MiB{missed}")
    typer.echo(f"{out or base / 'release'}: {manifest['bytes'] / MIB:.2f} MiB")


@commands.command("unpack")
def unpack_weights(
    folder: Annotated[Path, typer.Argument(help="Packed weights, e.g. models/smollm2-135m/release.")],
    out: Annotated[Path, typer.Option(help="Model folder to make.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Whose recipe names the base. Default: theirs.")
    ] = None,
    control: Annotated[str | None, typer.Option(help="Make this control instead: full, none or truncated.")] = None,
) -> None:
    """Make a model folder of packed weights and the packaged ones that they change."""
    from refrag_platform.compact.packing import unpack
    from refrag_platform.compact.record import read_manifest

    recipe, base = _recipe(model or read_manifest(folder)["model"])
    unpack(folder, recipe, base, out, control)
    typer.echo(f"{out}: {control or recipe.name}")


def _figures(named: list[str]) -> dict[str, dict[str, Any]]:
    from refrag_platform.compact.record import training_figures
    from refrag_platform.stages import STAGES

    figures = {}
    for stage, _, file in (text.partition("=") for text in named):
        if stage not in STAGES or not Path(file).is_file():
            raise typer.BadParameter(f"--training {stage}={file}: give STAGE=FILE, e.g. cpt=summary.json, of a file")
        figures[stage] = training_figures(json.loads(Path(file).read_text(encoding="utf-8")))
    return figures


@commands.command("card")
def write_card(
    folder: Annotated[Path, typer.Argument(help="Packed weights, e.g. models/smollm2-135m/release.")],
    results: Annotated[
        list[Path], typer.Option(help="JSON of `refrag evaluate` or `refrag bench frontier`; again for more.")
    ],
) -> None:
    """Write the README.md of packed weights again, with these results; the weights stay as they are."""
    from refrag_platform.compact.card import model_card
    from refrag_platform.compact.packing import CARD
    from refrag_platform.compact.record import read_manifest
    from refrag_platform.recipes import read_recipe

    manifest = read_manifest(folder)
    # Without params.yaml's overrides, which are this project's own.
    recipe = read_recipe(find_project().recipe_path(manifest["model"]))
    card = model_card(recipe, manifest, [_report(path) for path in results])
    write_text(folder / CARD, card)


def _report(path: Path) -> str:
    """The section of the model card on a result file."""
    from refrag_platform.bench.report import quality_and_speed
    from refrag_platform.evaluation.report import evaluation_report

    result = json.loads(path.read_text(encoding="utf-8"))
    return quality_and_speed(result) if result.get("benchmark") == "frontier" else evaluation_report(result)


def _earlier(stages: Sequence[Manifest]) -> Earlier | None:
    """The packed weights that these stages' training began with, if it did."""
    from refrag_platform.compact.record import MANIFEST, earlier_weights
    from refrag_platform.stages import SHIPPED

    read = [source for stage in stages for source in stage.sources if source.path.endswith(f"/{SHIPPED}/{MANIFEST}")]
    return earlier_weights(find_project().root, read[-1].path, read[-1].hash) if read else None


def _stage_manifests(name: str) -> list[Manifest]:
    """Manifests of the stages up to the model that were run here, or landed."""
    from refrag_platform.artifacts.manifest import FILE_NAME, Manifest

    stages = ("corpus", "reconstruction", "cpt", "finetuned", "policy")
    folders = [find_project().stage_dir(stage, name) for stage in stages]
    return [Manifest.read(folder) for folder in folders if (folder / FILE_NAME).is_file()]


def _recipe(name: str) -> tuple[Recipe, Path]:
    project = find_project()
    return project.recipe(name), project.recipe_path(name).parent
