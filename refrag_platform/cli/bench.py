"""`refrag bench`: how fast the platform is, each figure beside the plain way of doing the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add this family to `refrag`."""
    family = typer.Typer(no_args_is_help=True, help="Speed, each figure beside the plain way of doing the same.")
    family.callback()(_family)
    family.command("train")(train)
    app.add_typer(family, name="bench")


def _family() -> None:
    """Speed, each figure beside the plain way of doing the same."""


def train(
    model: Annotated[str, typer.Option("--model", "-m", help="A model of `refrag recipes ls`, or a recipe file.")],
    json: Annotated[Path, typer.Option("--json", help="Write the result here: {rows: [...], ...}.")],
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Default: the recipe's.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Measured steps.")] = 20,
    warmup: Annotated[int, typer.Option("--warmup", min=1, help="Steps before them, compilation included.")] = 5,
) -> None:
    """Decoder positions per second, MFU and peak memory of continual pre-training, optimizer included.

    The row `refrag` is the loop of `refrag run cpt`; `plain transformers` is an eager loop with the model's
    own loss on the same batch. A position is what the decoder reads: context_tokens / k vectors and the
    output tokens. Every weight trains, the encoder's too.
    """
    from refrag_platform.bench.train import bench_train
    from refrag_platform.evaluation.stage import write_json
    from refrag_platform.model.refrag import RefragModel
    from refrag_platform.project import Project
    from refrag_platform.recipes import read_recipe

    if Path(model).is_file():
        recipe, base = read_recipe(Path(model)), Path(model).parent
    else:
        project = Project.find()
        recipe, base = project.recipe(model), project.recipe_path(model).parent
    settings = recipe.cpt.model_copy(update={"batch_size": batch_size or recipe.cpt.batch_size})
    result = {"model": recipe.name, **bench_train(RefragModel.create(recipe, base), settings, steps, warmup)}
    json.parent.mkdir(parents=True, exist_ok=True)
    write_json(json, result)
    for row in result["rows"]:
        mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
        typer.echo(
            f"{row['loop']:>20}: {row['positions_per_second']:,} positions/s, "
            f"{row['step_seconds'] * 1000:.1f} ms a step{mfu}, {row['memory_gb']} GB"
        )
