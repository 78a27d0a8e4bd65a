"""params.yaml, the dial file: which models DVC and Dagster run. Edits leave the user's comments and layout alone.

By hand: `refrag recipes add NAME`.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.project import Project
from refrag_platform.stages import STAGES

DIALS = "params.yaml"


def require_named(project: Project, model: str) -> None:
    """Check that DVC and Dagster run `model`.

    Raises:
        RefragError: params.yaml does not name it; with the command that adds it.
    """
    named = project.models()
    if model not in named:
        raise RefragError(
            f"{DIALS}: models names {', '.join(named) or 'none'}, not {model!r}, so DVC and Dagster don't run it; "
            f"`refrag recipes add {model}` adds it"
        )


def add_model(project: Project, model: str) -> bool:
    """Add `model` to params.yaml, with overrides that change nothing; whether there was anything to add.

    Raises:
        RecipeError: there is no such recipe, it is wrong, or it leaves out a section that DVC watches.
        RefragError: params.yaml is laid out in a way that can't be edited.
    """
    project.recipe(model)
    watched = list(dict.fromkeys(section for stage in STAGES.values() for section in stage.sections))
    _require_sections(project.recipe_path(model), model, watched)
    path = project.root / DIALS
    before = text = path.read_text(encoding="utf-8")
    wanted = project.params()
    if model not in wanted["models"]:
        text = _with_model(text, model)
        wanted["models"] = [*wanted["models"], model]
    if model not in (wanted.get("overrides") or {}):
        nothing = ", ".join(f"{section}: {{}}" for section in watched)
        text = _with_override(text, model, f"{{{nothing}}}")
        wanted["overrides"] = {**(wanted.get("overrides") or {}), model: {section: {} for section in watched}}
    if yaml.safe_load(text) != wanted:
        raise RefragError(f"{path} can't be edited as it is laid out; add {model} to models and to overrides by hand")
    if text != before:
        partial = path.with_name(f".{DIALS}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    # DVC wants it to be there, even where it is empty.
    project.source_dir(model).mkdir(parents=True, exist_ok=True)
    return text != before


def only_model(project: Project, model: str) -> str:
    """The text of params.yaml with `models` cut down to one; all else, comments included, stays."""
    text = (project.root / DIALS).read_text(encoding="utf-8")
    models = _value(text, "models")
    assert isinstance(models, yaml.SequenceNode)  # Project.models() has read it
    last = models if models.flow_style else models.value[-1]
    return f"{text[: models.start_mark.index]}[{model}]{text[last.end_mark.index :]}"


def _require_sections(path: Path, model: str, watched: list[str]) -> None:
    """DVC refuses a key that is not there, even where the default would do."""
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    if missing := [key for key in (*watched, "seed") if key not in written]:
        raise RecipeError(
            f"{path}: DVC needs every section to be written down, if only as `{missing[0]}: {{}}`; "
            f"add {', '.join(missing)} to run {model} with it"
        )


def _with_model(text: str, model: str) -> str:
    models = _value(text, "models")
    assert isinstance(models, yaml.SequenceNode)  # Project.models() has read it
    if models.flow_style:
        listed = ", ".join([*(item.value for item in models.value), model])
        return f"{text[: models.start_mark.index]}[{listed}]{text[models.end_mark.index :]}"
    line_end = text.find("\n", models.value[-1].end_mark.index)
    end = line_end if line_end >= 0 else len(text)
    return f"{text[:end]}\n{' ' * models.start_mark.column}- {model}{text[end:]}"


def _with_override(text: str, model: str, sections: str) -> str:
    overrides = _value(text, "overrides")
    if overrides is None:
        return f"{text.rstrip()}\noverrides:\n  {model}: {sections}\n"
    start = overrides.start_mark.index
    if not isinstance(overrides, yaml.MappingNode) or not overrides.value:
        return f"{text[:start].rstrip(' ')}\n  {model}: {sections}{text[overrides.end_mark.index :]}"
    separator = ", " if overrides.flow_style else "\n" + " " * overrides.start_mark.column
    first = overrides.value[0][0].start_mark.index
    return f"{text[:first]}{model}: {sections}{separator}{text[first:]}"


def _value(text: str, name: str) -> yaml.Node | None:
    """The node of a top-level key, with its marks in the text."""
    mapping = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(mapping, yaml.MappingNode)
    return next((value for key, value in mapping.value if key.value == name), None)
