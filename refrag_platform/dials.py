"""params.yaml, the dial file: which models DVC and Dagster run. Edits leave the user's comments and layout alone.

By hand: `refrag recipes add NAME`.
"""

from __future__ import annotations

from collections.abc import Iterable

import yaml

from refrag_platform.errors import RefragError
from refrag_platform.files import write_text
from refrag_platform.project import DIALS, Project


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
    """Add `model` to params.yaml, with no overrides, which DVC wants to see said; whether there was anything to add.

    Raises:
        RecipeError: there is no such recipe, or it is wrong.
        RefragError: params.yaml is laid out in a way that can't be edited.
    """
    project.recipe(model)
    if project.control(model):
        raise RefragError(
            f"{model} is a control, which `refrag run all --model {model}` trains; DVC and Dagster run models"
        )
    path = project.root / DIALS
    before = text = path.read_text(encoding="utf-8")
    wanted = project.params()
    if model not in wanted["models"]:
        text = _with_model(text, model)
        wanted["models"] = [*wanted["models"], model]
    if model not in (wanted.get("overrides") or {}):
        text = _with_override(text, model)
        wanted["overrides"] = {**(wanted.get("overrides") or {}), model: {}}
    if yaml.safe_load(text) != wanted:
        raise RefragError(f"{path} can't be edited as it is laid out; add {model} to models and to overrides by hand")
    if text != before:
        write_text(path, text)
    # DVC wants it to be there, even where it is empty.
    project.source_dir(model).mkdir(parents=True, exist_ok=True)
    return text != before


def only_models(project: Project, names: Iterable[str]) -> str:
    """The text of params.yaml with `models` cut down to these; all else, comments included, stays."""
    text = (project.root / DIALS).read_text(encoding="utf-8")
    models = _value(text, "models")
    assert isinstance(models, yaml.SequenceNode)  # Project.models() has read it
    last = models if models.flow_style else models.value[-1]
    # A list in lines may start at the margin, where a value must not.
    margin = "" if models.flow_style or models.start_mark.column else "  "
    return f"{text[: models.start_mark.index]}{margin}[{', '.join(names)}]{text[last.end_mark.index :]}"


def _with_model(text: str, model: str) -> str:
    models = _value(text, "models")
    assert isinstance(models, yaml.SequenceNode)  # Project.models() has read it
    if models.flow_style:
        listed = ", ".join([*(item.value for item in models.value), model])
        return f"{text[: models.start_mark.index]}[{listed}]{text[models.end_mark.index :]}"
    line_end = text.find("\n", models.value[-1].end_mark.index)
    end = line_end if line_end >= 0 else len(text)
    return f"{text[:end]}\n{' ' * models.start_mark.column}- {model}{text[end:]}"


def _with_override(text: str, model: str) -> str:
    overrides = _value(text, "overrides")
    if overrides is None:
        return f"{text.rstrip()}\noverrides:\n  {model}: {{}}\n"
    start = overrides.start_mark.index
    if not isinstance(overrides, yaml.MappingNode) or not overrides.value:
        return f"{text[:start].rstrip(' ')}\n  {model}: {{}}{text[overrides.end_mark.index :]}"
    separator = ", " if overrides.flow_style else "\n" + " " * overrides.start_mark.column
    first = overrides.value[0][0].start_mark.index
    return f"{text[:first]}{model}: {{}}{separator}{text[first:]}"


def _value(text: str, name: str) -> yaml.Node | None:
    """The node of a top-level key, with its marks in the text."""
    mapping = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(mapping, yaml.MappingNode)
    return next((value for key, value in mapping.value if key.value == name), None)
