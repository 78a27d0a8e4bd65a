"""`refrag recipes`: list, show and check recipes, and add them to what DVC and Dagster run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add this family to `refrag`."""
    family = typer.Typer(no_args_is_help=True, help="List, show, check and add recipes.")
    family.command("ls")(list_recipes)
    family.command("show")(show_recipe)
    family.command("validate")(validate_recipe)
    family.command("add")(add_recipe)
    app.add_typer(family, name="recipes")


def list_recipes() -> None:
    """List the models with a recipe; * marks those that params.yaml runs."""
    from refrag_platform.project import Project

    project = Project.find()
    running, names = project.models(), project.recipes()
    width = max(map(len, names), default=0)
    for name in names:
        typer.echo(f"{'*' if name in running else ' '} {name:<{width}} {project.recipe(name).description}")


def show_recipe(name: Annotated[str, typer.Argument(help="A model, e.g. tiny.")]) -> None:
    """Print a recipe with params.yaml's overrides and the defaults, every key explained."""
    from refrag_platform.project import Project

    recipe = Project.find().recipe(name)
    typer.echo("\n".join(_explained(recipe, 0)))


def validate_recipe(path: Annotated[Path, typer.Argument(help="A recipe file.")]) -> None:
    """Check a recipe file; every fault is named with its key, its value and what is allowed."""
    from refrag_platform.recipes import read_recipe

    recipe = read_recipe(path)
    typer.echo(f"{path}: valid, model {recipe.name}")


def add_recipe(name: Annotated[str, typer.Argument(help="A model with a recipe, e.g. tiny.")]) -> None:
    """Add a model to params.yaml, so that DVC and Dagster run it too; nothing else in the file changes."""
    from refrag_platform.dials import add_model
    from refrag_platform.project import Project

    added = add_model(Project.find(), name)
    typer.echo(f"params.yaml: {f'added {name}' if added else f'{name} is there'}; DVC and Dagster run it")


def _explained(section: Any, depth: int) -> list[str]:
    """YAML lines of a section, each key with its description behind it."""
    import yaml
    from pydantic import BaseModel

    lines = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        pad = "  " * depth
        note = f"  # {field.description}" if field.description else ""
        if isinstance(value, BaseModel):
            lines += [f"{pad}{key}:{note}", *_explained(value, depth + 1)]
            continue
        if isinstance(value, list) and value and isinstance(value[0], BaseModel):
            lines.append(f"{pad}{key}:{note}")
            for item in value:
                first, *rest = _explained(item, depth + 2)
                lines += [f"{pad}  - {first.strip()}", *rest]
            continue
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
        lines.append(f"{pad}{key}: {text}{note}")
    return lines
