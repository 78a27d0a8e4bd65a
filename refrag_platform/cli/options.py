"""What several commands share: options and how they are read, and the recipe behind a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from refrag_platform.errors import RefragError

if TYPE_CHECKING:
    from refrag_platform.model.loading import Bundle
    from refrag_platform.model.policy import PolicyNetwork
    from refrag_platform.project import Project
    from refrag_platform.recipes import Recipe
    from refrag_platform.store.relevance import PassageRelevance

K = TypeVar("K", bound=str)

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A model of `refrag recipes ls` (its fine-tuned checkpoint), or a model folder."
    ),
]
RecipeOrFile = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A model of `refrag recipes ls`, with params.yaml's overrides, or a recipe file, without."
    ),
]
Json = Annotated[Path, typer.Option(help="Write the result here: {rows: [...], ...}.")]
Report = Annotated[Path | None, typer.Option(help="Also write report.md, report.json and a picture into this folder.")]
Controls = Annotated[
    Path | None,
    typer.Option(
        help="Folder of tuned controls: model folders named by what they were trained to read, e.g. full, none, plain. "
        "Default: those of the recipe's `controls` that are trained."
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        help="Recipe that names the system `untuned`'s decoder, and the retriever whose view of the passages a policy "
        "may be told. Default: the model's, where known."
    ),
]
Relevance = Annotated[
    bool, typer.Option("--relevance/--no-relevance", help="Tell a policy that reads it how near each passage is.")
]
Seed = Annotated[int, typer.Option(help="Of the documents drawn, chance and intervals.")]


def find_project() -> Project:
    """The project around the working directory; recipes and their libraries are imported with it, so late.

    Raises:
        RefragError: there is none.
    """
    from refrag_platform.project import Project

    return Project.find()


def known_recipe(model: str, bundle: Bundle, recipe_file: Path | None) -> tuple[Recipe, Path] | None:
    """The recipe that was given, else the model's, with its folder; None where neither is known."""
    from refrag_platform.evaluation.decoders import recipe_of
    from refrag_platform.recipes import read_recipe

    return (read_recipe(recipe_file), recipe_file.parent) if recipe_file else recipe_of(model, bundle.folder)


def known_controls(
    folder: Path | None, model: str, bundle: Bundle, stage: Literal["cpt", "finetuned"], kinds: Sequence[K]
) -> dict[K, Path]:
    """The tuned controls in a folder, else those that the model's own recipe declares and `stage` has trained."""
    from refrag_platform.evaluation.decoders import control_folders, declared_controls, recipe_of

    if folder:
        return control_folders(folder, kinds)
    known = recipe_of(model, bundle.folder)
    return declared_controls(find_project(), known[0], stage, kinds) if known else {}


def relevance_or_refuse(
    model: str, bundle: Bundle, policy: PolicyNetwork | None, known: tuple[Recipe, Path] | None
) -> PassageRelevance | None:
    """What the policy is to be told of passages, if it reads that, by the retriever of the recipe (`known_recipe`)."""
    from refrag_platform.store.relevance import relevance_for

    if policy is None or not policy.reads_relevance:
        return None
    if known is None:
        raise RefragError(
            f"the policy of {model} is told how near a retriever finds each passage, and the recipe that names the "
            "retriever isn't known; name it by --recipe, or let the policy do without by --no-relevance"
        )
    return relevance_for(policy, *known, bundle.model.device)


def parse_shares(shares: str) -> list[float]:
    try:
        values = [float(part) for part in shares.split(",") if part.strip()]
    except ValueError:
        values = [-1.0]
    if not all(0 <= share <= 1 for share in values):
        raise RefragError(f"--shares is {shares!r}; give shares from 0 to 1, e.g. 0,0.1,0.25")
    return values


def parse_numbers(option: str, value: str) -> tuple[int, ...]:
    """Positive numbers between commas."""
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise RefragError(f"{option} is {value!r}; it must be positive numbers between commas, e.g. 1,8,16")
    return tuple(map(int, parts))


def parse_range(passages: str) -> tuple[int, int]:
    """The least and the most passages of a context."""
    try:
        least, most = map(int, passages.split(","))
    except ValueError:
        least, most = 0, 0
    if not 3 <= least <= most:
        raise RefragError(f"--passages is {passages!r}; give the least and the most, 3 or more, e.g. 10,20")
    return least, most
