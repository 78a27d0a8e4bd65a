"""`refrag recipes`: list, show and check recipes, and add them to what DVC and Dagster run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from refrag_platform.cli.options import find_project

commands = typer.Typer(name="recipes", no_args_is_help=True, help="List, show, check and add recipes.")


@commands.command("ls")
def list_recipes() -> None:
    """List the models with a recipe; * marks those that params.yaml runs."""
    project = find_project()
    running, names = project.models(), project.recipes()
    width = max(map(len, names), default=0)
    for name in names:
        typer.echo(f"{'*' if name in running else ' '} {name:<{width}} {project.recipe(name).description}")


@commands.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A model, e.g. tiny.")]) -> None:
    """Print a recipe with all that it extends, params.yaml's overrides and the defaults, every key explained.

    Behind each section stands which files say something of it; where they differ, the last one counts.
    """
    from refrag_platform.recipes import origins

    project = find_project()
    recipe = project.recipe(name)
    typer.echo("\n".join(_explained(recipe, 0, origins(project.recipe_layers(name)))))


@commands.command("validate")
def validate_recipe(path: Annotated[Path, typer.Argument(help="A recipe file.")]) -> None:
    """Check a recipe file; every fault is named with its key, its value and what is allowed."""
    from refrag_platform.recipes import read_recipe

    recipe = read_recipe(path)
    typer.echo(f"{path}: valid, model {recipe.name}")


@commands.command("add")
def add_recipe(name: Annotated[str, typer.Argument(help="A model with a recipe, e.g. tiny.")]) -> None:
    """Add a model to params.yaml, so that DVC and Dagster run it too; nothing else in the file changes."""
    from refrag_platform.dials import add_model
    from refrag_platform.history.pipeline import write_pipeline

    project = find_project()
    added = add_model(project, name)
    write_pipeline(project)
    typer.echo(f"params.yaml: {f'added {name}' if added else f'{name} is there'}; DVC and Dagster run it")


@commands.command("resolve")
def resolve_recipe(name: Annotated[str, typer.Argument(help="A model, e.g. tiny.")]) -> None:
    """Write all settings of a model into models/NAME/run/recipe.yaml, by which DVC sees what changed.

    The first stage of dvc.yaml runs it; `refrag recipes show` explains the same settings.
    """
    from refrag_platform.history.pipeline import write_resolved

    project = find_project()
    path = project.resolved_recipe(name).relative_to(project.root)
    typer.echo(f"{path}: {'written' if write_resolved(project, name) else 'is up to date'}")


def _explained(section: Any, depth: int, origins: Mapping[str, Sequence[str]]) -> list[str]:
    """YAML lines of a section, each key with its description behind it, each section with its `origins`."""
    import yaml
    from pydantic import BaseModel

    lines, plain = [], section.model_dump(mode="json")
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        pad = "  " * depth
        note = f"  # {field.description}" if field.description else ""
        if isinstance(value, BaseModel):
            if not depth:
                note = f"  # {', '.join(origins.get(key, ['defaults']))}"
            lines += [f"{pad}{key}:{note}", *_explained(value, depth + 1, origins)]
            continue
        if isinstance(value, list) and value and isinstance(value[0], BaseModel):
            lines.append(f"{pad}{key}:{note}")
            for item in value:
                first, *rest = _explained(item, depth + 2, origins)
                lines += [f"{pad}  - {first.strip()}", *rest]
            continue
        text = yaml.safe_dump(plain[key], default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
        lines.append(f"{pad}{key}: {text}{note}")
    return lines
