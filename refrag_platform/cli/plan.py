"""`refrag plan`: memory, hours and cost of a recipe's training, before it is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refrag_platform.cli.options import RecipeOrFile, find_project
from refrag_platform.files import write_json

if TYPE_CHECKING:
    from refrag_platform.bench.gpus import Gpu
    from refrag_platform.bench.plan import StagePlan

commands = typer.Typer()


@commands.command()
def plan(
    model: RecipeOrFile,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: h100, h200, a100, l40s, b200.")] = "h100",
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs of each stage that names an accelerate_config; default: that file's."),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of one GPU, in whatever currency; adds the cost.")
    ] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option(
            help="Results of `refrag bench train`, by which hours are reckoned. Repeatable; default: "
            "docs/results/bench-train-*.json."
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the plan here, in bytes and seconds.")] = None,
) -> None:
    """Say what each training stage takes: memory of a GPU, hours, and what they cost.

    Nothing is trained, downloaded (but for a hub model's config.json, where its shape isn't known) or rented. Memory is
    what the training's own code would hold, shared out as the stage's accelerate_config says; hours are matrix products
    and attention over the GPU's peak, times the share of it that `refrag bench train` reached. What is assumed is
    printed below the table.

    A stage that does not fit: set micro_batch_size lower, name another file of models/accelerate in the recipe
    (zero1, zero2, zero3), or set lora_rank.

    Example: refrag plan --model llama-2-7b --gpus 64 --gpu h100 --price-per-hour 2.5
    """
    from refrag_platform.bench.gpus import gpu as known
    from refrag_platform.bench.plan import STAGES, assumptions
    from refrag_platform.bench.plan import plan as planned
    from refrag_platform.progress import waiting

    project, kind = find_project(), known(gpu)
    results = measured or sorted((project.root / "docs/results").glob("bench-train-*.json"))
    recipe, base = project.recipe_or_file(model)
    with waiting(f"planning the stages of {recipe.name}"):
        plans = planned(recipe, base, kind, gpus, results)
    told = assumptions(plans, kind)
    _show(plans, kind, price_per_hour)
    if taken := sorted(set(STAGES) - {one.stage for one in plans}, key=STAGES.index):
        typer.echo(f"taken over, not trained (continue_from): {', '.join(taken)}")
    typer.echo("\nAssumed:\n" + "\n".join(f"- {sentence}" for sentence in told))
    if json:
        write_json(json, _result(recipe.name, plans, kind, price_per_hour, told))


def _show(plans: list[StagePlan], kind: Gpu, price: float | None) -> None:
    from refrag_platform.bench.plan import USABLE

    for one in plans:
        memory, count = one.memory, one.strategy.processes
        parts = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in vars(memory).items() if size)
        fits = "fits" if memory.total <= USABLE * kind.memory else "does not fit"
        cost = "" if price is None else f", costs {one.cost(price):,.2f}"
        typer.echo(
            f"{one.stage}: {count} x {kind.name}, {one.strategy}; {one.trained / 1e6:,.1f}M parameters train; "
            f"micro-batch {one.micro_batch} x {one.micro_steps}\n"
            f"  memory {memory.total / 1e9:,.1f} of {kind.memory / 1e9:,.0f} GB, {fits} ({parts})\n"
            f"  time {one.seconds / 3600:,.2f} h{cost}: {one.steps:,} steps of {one.positions:,.0f} positions, "
            f"{one.positions * one.steps / one.seconds:,.0f} positions/s"
        )
    hours = sum(one.seconds for one in plans) / 3600
    cost = "" if price is None else f", {sum(one.cost(price) for one in plans):,.2f}"
    typer.echo(
        f"all: {hours:,.2f} h, {sum(one.seconds / 3600 * one.strategy.processes for one in plans):,.1f} GPU hours{cost}"
    )


def _result(model: str, plans: list[StagePlan], kind: Gpu, price: float | None, told: list[str]) -> dict[str, object]:
    from dataclasses import asdict

    rows = []
    for one in plans:
        row = asdict(one) | {"memory_total": one.memory.total}
        row["utilisation"] |= {"file": one.utilisation.file.name}
        rows.append(row if price is None else row | {"cost": one.cost(price)})
    return {"model": model, "gpu": asdict(kind), "price_per_hour": price, "rows": rows, "assumptions": told}
