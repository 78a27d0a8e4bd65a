"""Packed weights: all that serving needs beyond the packaged weights, in a folder small enough for Git.

refrag weights pack --model NAME --out models/NAME/release
refrag weights unpack models/NAME/release --out somewhere

| file | holds |
| --- | --- |
| encoder.safetensors | what training changed of encoder and projection |
| decoder.safetensors | what it changed of the decoder |
| policy.safetensors, policy.json | the policy, if there is one |
| controls/SYSTEM.safetensors | what tuning changed of a control's decoder, for the gap recovered |
| manifest.json | written last: base and earlier weights, codings, trainings, their data, digests and sizes of files |
| README.md, NOTICE | model card and licences |
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.compact.card import model_card, notice
from refrag_platform.compact.coding import MIB, Coding, StateDict, decode, encode, relative_error
from refrag_platform.compact.record import (
    FORMAT,
    MANIFEST,
    RECORDED,
    Earlier,
    figures_of,
    file_facts,
    is_packed,
    named_sources,
    read_manifest,
)
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.files import whole, write_json
from refrag_platform.model.loading import policy_folder
from refrag_platform.model.policy import SETTINGS_FILE as POLICY_SETTINGS
from refrag_platform.model.policy import WEIGHTS_FILE as POLICY_WEIGHTS
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel, read_settings
from refrag_platform.recipes import Recipe

CARD, NOTICE = "README.md", "NOTICE"
ENCODER, DECODER, CONTROLS = "encoder.safetensors", "decoder.safetensors", "controls"
BACKBONE = "encoder.backbone."
POLICY_BITS = 8
# What half precision and other machines' arithmetic make of a table that isn't trained.
FROZEN_TOLERANCE = 0.01
# The same of a single number: two of the last bits that bfloat16 has.
UNCHANGED_TOLERANCE = 2**-7


@dataclass(frozen=True)
class Codings:
    """How each part is written; encoder_layers: an encoder's copy of the decoder's layers, where it is one."""

    encoder: Coding
    decoder: Coding
    controls: Coding
    encoder_layers: Coding = field(default_factory=lambda: Coding(0, 4 * MIB))


def pack(
    model: Path,
    recipe: Recipe,
    base_dir: Path,
    out: Path,
    codings: Codings,
    controls: Mapping[str, Path] | None = None,
    stages: Sequence[Manifest] = (),
    results: Sequence[str] = (),
    training: Mapping[str, Mapping[str, Any]] | None = None,
    data: Sequence[str] = (),
    terms: str = "",
    limit: int = 24 * MIB,
    replace: bool = False,
    policy: Path | None = None,
    earlier: Earlier | None = None,
) -> dict[str, Any]:
    """Pack the model folder `model` into the new folder `out`; returns its manifest.

    Args:
        recipe, base_dir: of the untrained model; `base_dir` is the recipe's folder.
        controls: model folders of tuned controls, by system; of these the decoder is kept.
        stages: manifests of the stages that made the model, the corpus' among them, which its own states.
        results, terms: for README.md and NOTICE (compact/card.py). Without terms those of `earlier` stay.
        training: by stage, the figures of its training.json, which an artifact that is taken from packed weights has
            too; where `stages` don't state them.
        data: what it was trained on, a line each, for manifest.json and README.md; default: the recipe's sources.
        limit: bytes of all files together.
        replace: `out` may hold packed weights already; they are replaced as a whole.
        policy: the folder of the model's policy; default: as `policy_folder` finds it.
        earlier: the packed weights that training went on from, those in `out` maybe. Encoder or decoder, where training
            left it as it was, is taken from there as it is: rounded again, it would lose again.

    Raises:
        RefragError: `out` is there, or holds something else; the new ones are larger than `limit`.
        ArtifactError: the model is not of this recipe, or its policy is missing.
    """
    if out.exists() and not replace:
        raise RefragError(f"{out} is there already; give --replace, or another --out")
    if out.exists() and not is_packed(out):
        raise RefragError(f"{out} is there and holds no packed weights, so it is not replaced; give another --out")
    base = RefragModel.create(recipe, base_dir)
    before, trained = model_state(base), _trained_state(model, base)
    with whole(out) as partial:
        partial.mkdir(parents=True)
        errors, coded = {}, asdict(codings)
        for file, coding, is_decoder in ((ENCODER, codings.encoder, False), (DECODER, codings.decoder, True)):
            original, changed = _part(before, is_decoder), _part(trained, is_decoder)
            if earlier and _is_unchanged(earlier.folder / file, original, changed):
                shutil.copy(earlier.folder / file, partial)
                errors[file] = earlier.manifest["relative_errors"][file]
                names = ("decoder",) if is_decoder else ("encoder", "encoder_layers")
                coded |= {name: earlier.manifest["codings"][name] for name in names}
                continue
            layers = None if is_decoder or recipe.encoder.source != "decoder" else codings.encoder_layers
            errors[file] = _write(partial / file, original, changed, coding, layers)
        if place := policy or policy_folder(model):
            weights = PolicyNetwork.load(place).state_dict()
            nothing = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
            errors[POLICY_WEIGHTS] = _write(partial / POLICY_WEIGHTS, nothing, weights, Coding(POLICY_BITS))
            shutil.copy(place / POLICY_SETTINGS, partial)
        for system, folder in (controls or {}).items():
            (partial / CONTROLS).mkdir(exist_ok=True)
            changed = _part(_trained_state(folder, base), True)
            name = f"{CONTROLS}/{system}.safetensors"
            errors[name] = _write(partial / name, _part(before, True), changed, codings.controls)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        size = sum(path.stat().st_size for path in files)
        manifest = {
            "format": FORMAT,
            "model": recipe.name,
            "base": {"decoder": recipe.decoder.source, "encoder": recipe.encoder.source, "digest": base_digest(base)},
            "codings": coded,
            # Of the change from the base, in root mean square.
            "relative_errors": {name: round(error, 5) for name, error in errors.items()},
            "settings": _shape(recipe),
            "rates": read_settings(model)["rates"],
            "training": figures_of(stages) | dict(training or {}),
            "stages": {stage.stage: stage.model_dump(mode="json", include=RECORDED) for stage in stages},
            **({"continues": earlier.record} if earlier else {}),
            "data": list(data) or named_sources(recipe),
            "files": {path.relative_to(partial).as_posix(): file_facts(path) for path in files},
            "bytes": size,
        }
        if size > limit:
            raise RefragError(
                f"the packed weights take {size / MIB:.1f} MiB, and {limit / MIB:.1f} are allowed; "
                "give fewer --encoder-bits, --encoder-mib, --decoder-bits, --decoder-mib or --control-mib"
            )
        (partial / CARD).write_text(model_card(recipe, manifest, results), encoding="utf-8")
        if earlier and not terms:
            shutil.copy(earlier.folder / NOTICE, partial)
        else:
            (partial / NOTICE).write_text(notice(recipe, terms), encoding="utf-8")
        write_json(partial / MANIFEST, manifest)
    return manifest


def load_packed(
    folder: Path, recipe: Recipe, base_dir: Path, control: str | None = None
) -> tuple[RefragModel, PolicyNetwork | None]:
    """The model and its policy; with `control` the base model with that control's decoder, and no policy.

    Raises:
        ArtifactError: the packed weights are not whole, or of other base weights than the recipe's.
    """
    manifest = read_manifest(folder)
    model = RefragModel.create(recipe, base_dir)
    model.rates = tuple(manifest.get("rates", [1]))
    if manifest["base"]["digest"] != base_digest(model):
        raise ArtifactError(
            f"{folder} changes base weights of digest {manifest['base']['digest']} ({manifest['base']['decoder']}, "
            f"{manifest['base']['encoder']}); the recipe {recipe.name} gives {base_digest(model)} "
            f"({recipe.decoder.source}, {recipe.encoder.source}); use the recipe and packages that it was made with"
        )
    for section, values in _shape(recipe).items():
        # A setting that is newer than the weights had its default.
        fields = type(getattr(recipe, section)).model_fields
        stated = {key: fields[key].default for key in values} | manifest["settings"][section]
        if changed := [key for key in values if values[key] != stated[key]]:
            raise ArtifactError(
                f"{folder} was made with other settings than the recipe {recipe.name} has: "
                + ", ".join(f"{section}.{key} {stated[key]!r}, not {values[key]!r}" for key in changed)
            )
    names = [ENCODER, DECODER] if control is None else [f"{CONTROLS}/{control}.safetensors"]
    for name in names:
        if name not in manifest["files"]:
            raise ArtifactError(f"{folder} has no {name}; it holds {', '.join(manifest['files'])}")
        _set_state(model, decode(model_state(model), load_file(folder / name)))
    model.eval()
    return model, read_policy(folder, manifest) if control is None else None


def read_policy(folder: Path, manifest: Mapping[str, Any]) -> PolicyNetwork | None:
    """The policy of packed weights with this manifest (`read_manifest`), if it has one."""
    if POLICY_WEIGHTS not in manifest["files"]:
        return None
    policy = PolicyNetwork(**json.loads((folder / POLICY_SETTINGS).read_text(encoding="utf-8")))
    nothing = {name: torch.zeros_like(tensor) for name, tensor in policy.state_dict().items()}
    policy.load_state_dict(decode(nothing, load_file(folder / POLICY_WEIGHTS)))
    # What it was before it was packed, in fewer bits.
    policy.encoder_digest = None
    return policy.eval()


def unpack(folder: Path, recipe: Recipe, base_dir: Path, out: Path, control: str | None = None) -> None:
    """Make the new model folder `out` of packed weights, in bfloat16 as trained models are saved.

    Raises:
        RefragError: `out` is there already, or as `load_packed` says.
    """
    if out.exists():
        raise RefragError(f"{out} is there already; remove it, or give another --out")
    model, policy = load_packed(folder, recipe, base_dir, control)
    with whole(out) as partial:
        partial.mkdir()
        model.save(partial, torch.bfloat16)
        if policy is not None:
            policy.save(partial)


def _shape(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The settings that weights must share with a recipe to fit it; base weights have a digest."""
    encoder = {key: value for key, value in recipe.section("encoder").items() if key not in ("source", "rates")}
    return {"encoder": encoder, "projection": recipe.section("projection")}


def model_state(model: RefragModel) -> dict[str, Tensor]:
    """A model's tensors, tied ones once."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[name] = tensor
    return state


def base_digest(model: RefragModel) -> str:
    """Hash of an untrained model's pretrained weights: decoder and encoder backbone.

    What is computed from them here may differ in a last bit from machine to machine, and doesn't count.
    """
    digest = hashlib.sha256()
    parts: dict[str, nn.Module] = {"decoder": model.decoder, "backbone": model.encoder.backbone}
    for part, module in parts.items():
        for name, tensor in sorted(module.named_parameters()):
            digest.update(f"{part}.{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _trained_state(folder: Path, base: RefragModel) -> dict[str, Tensor]:
    """The tensors of a trained model folder, in the names and shapes of the base.

    Raises:
        ArtifactError: it is another model.
    """
    trained, before = model_state(RefragModel.load(folder)), model_state(base)
    for name in sorted({*trained, *before}):
        tensor, wanted = trained.get(name), before.get(name)
        if tensor is None or wanted is None or tensor.shape != wanted.shape:
            raise ArtifactError(
                f"{folder} is not of this recipe: {name} is {'missing' if tensor is None else tuple(tensor.shape)}, "
                f"and the recipe makes it {'nothing' if wanted is None else tuple(wanted.shape)}"
            )
    for name in _frozen(base):
        away = float(
            (trained[name].float() - before[name].float()).norm() / before[name].float().norm().clamp(min=1e-12)
        )
        if away > FROZEN_TOLERANCE:
            raise ArtifactError(
                f"{folder} was not trained from the recipe's base weights: {name}, which isn't trained, differs by "
                f"{away:.1%}; give the recipe and packages that it was made with"
            )
        trained[name] = before[name]
    return trained


def _frozen(base: RefragModel) -> list[str]:
    """Tensors that no stage trains: tables that are computed from the packaged weights. They need not be kept."""
    trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    return [name for name in model_state(base) if name not in trained]


def _is_unchanged(file: Path, before: StateDict, trained: StateDict) -> bool:
    """Whether a part is what its packed file says, number by number, but for what half precision makes of it."""
    decoded = decode(before, load_file(file))
    return all(
        torch.allclose(trained[name].float(), decoded[name].float(), rtol=UNCHANGED_TOLERANCE, atol=1e-6)
        for name in trained
    )


def _part(state: StateDict, is_decoder: bool) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("decoder.") == is_decoder}


def _write(path: Path, before: StateDict, trained: StateDict, coding: Coding, layers: Coding | None = None) -> float:
    """Write one packed file; returns the relative error of what it gives back.

    Args: layers: how an encoder's backbone is written, if otherwise than the rest.
    """
    packed: dict[str, Tensor] = {}
    for is_backbone, how in ((False, coding), (True, layers or coding)):
        names = [name for name in trained if name.startswith(BACKBONE) == is_backbone]
        packed |= encode({name: before[name] for name in names}, {name: trained[name] for name in names}, how)
    save_file({name: tensor.contiguous() for name, tensor in packed.items()}, path)
    return relative_error(before, trained, decode(before, packed))


def _set_state(model: RefragModel, state: StateDict) -> None:
    # Tied tensors are named once, and set all the same.
    model.load_state_dict(state, strict=False)
