"""params.yaml, the dial file: which models DVC and Dagster run. Edits leave the user's comments and layout alone.

By hand: `refrag recipes add NAME`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.files import lock_file, write_text
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
        write_text(path, text)
    # DVC wants it to be there, even where it is empty.
    project.source_dir(model).mkdir(parents=True, exist_ok=True)
    return text != before


def set_override(project: Project, model: str, key: str, values: Mapping[str, str | None]) -> bool:
    """Set one key in sections of `overrides.MODEL`, at once, or take it away (None); whether anything changed.

    Args: values: the key's, by section.

    Raises:
        RefragError: params.yaml does not name the model, or is laid out in a way that can't be edited.
    """
    require_named(project, model)
    path = project.root / DIALS
    # Two runs may set two models' overrides at once.
    with lock_file(project.root / "work" / ".dials.lock"):
        before = text = path.read_text(encoding="utf-8")
        wanted = project.params()
        for section, value in values.items():
            own = ((wanted.get("overrides") or {}).get(model) or {}).get(section)
            if not isinstance(own, dict):
                raise RefragError(f"{path} has no overrides.{model}.{section}; `refrag recipes add {model}` writes it")
            if value is not None:
                text = _with_key(text, _mapping(text, "overrides", model, section), key, value)
                own[key] = value
            elif key in own:
                text = _without_key(text, _mapping(text, "overrides", model, section), key)
                del own[key]
        if yaml.safe_load(text) != wanted:
            raise RefragError(
                f"{path} can't be edited as it is laid out; set {key} in overrides.{model} by hand: "
                + ", ".join(f"{value or 'null'} in {section}" for section, value in values.items())
            )
        if text != before:
            write_text(path, text)
    return text != before


def only_model(project: Project, model: str) -> str:
    """The text of params.yaml with `models` cut down to one; all else, comments included, stays."""
    text = (project.root / DIALS).read_text(encoding="utf-8")
    models = _value(text, "models")
    assert isinstance(models, yaml.SequenceNode)  # Project.models() has read it
    last = models if models.flow_style else models.value[-1]
    # A list in lines may start at the margin, where a value must not.
    margin = "" if models.flow_style or models.start_mark.column else "  "
    return f"{text[: models.start_mark.index]}{margin}[{model}]{text[last.end_mark.index :]}"


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


def _with_key(text: str, mapping: yaml.MappingNode, key: str, value: str) -> str:
    for name, old in mapping.value:
        if name.value == key:
            return f"{text[: old.start_mark.index]}{value}{text[old.end_mark.index :]}"
    if not mapping.value:
        return f"{text[: mapping.start_mark.index]}{{{key}: {value}}}{text[mapping.end_mark.index :]}"
    first = mapping.value[0][0].start_mark
    separator = ", " if mapping.flow_style else "\n" + " " * first.column
    return f"{text[: first.index]}{key}: {value}{separator}{text[first.index :]}"


def _without_key(text: str, mapping: yaml.MappingNode, key: str) -> str:
    pairs = mapping.value
    place = next(number for number, (name, _) in enumerate(pairs) if name.value == key)
    if len(pairs) == 1:
        end = mapping.end_mark.index if mapping.flow_style else pairs[0][1].end_mark.index
        return f"{text[: mapping.start_mark.index]}{{}}{text[end:]}"
    if place + 1 < len(pairs):
        return text[: pairs[place][0].start_mark.index] + text[pairs[place + 1][0].start_mark.index :]
    return text[: pairs[place - 1][1].end_mark.index] + text[pairs[place][1].end_mark.index :]


def _mapping(text: str, *keys: str) -> yaml.MappingNode:
    """The mapping under nested keys, which are known to be there."""
    node = yaml.compose(text, yaml.SafeLoader)
    for key in keys:
        assert isinstance(node, yaml.MappingNode)
        node = next(value for name, value in node.value if name.value == key)
    assert isinstance(node, yaml.MappingNode)
    return node


def _value(text: str, name: str) -> yaml.Node | None:
    """The node of a top-level key, with its marks in the text."""
    mapping = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(mapping, yaml.MappingNode)
    return next((value for key, value in mapping.value if key.value == name), None)
