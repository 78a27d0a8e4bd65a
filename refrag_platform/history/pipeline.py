"""The stages of dvc.yaml, written from the registry: what else is in the file stays. Run: `refrag pipeline`.

DVC watches settings in one file, section by section. A recipe has several (what it extends, params.yaml, a run's), so
the pipeline's first stage puts them together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from refrag_platform.errors import RefragError
from refrag_platform.files import write_text
from refrag_platform.imports import PACKAGE, code_files
from refrag_platform.project import Project
from refrag_platform.recipes import extended
from refrag_platform.stages import STAGES, Stage

FILE_NAME = "dvc.yaml"
# The stage that writes a model's resolved recipe.
RECIPE = "recipe"
# DVC puts each model of params.yaml here.
MODEL = "${item.model}"
# Up to the next line that is not indented.
STAGES_SECTION = re.compile(r"^stages:\n.*?(?=^\S|\Z)", re.MULTILINE | re.DOTALL)


def pipeline_text(project: Project) -> str:
    """What dvc.yaml has to be: the file as it is, its section `stages` written anew."""
    text = (project.root / FILE_NAME).read_text(encoding="utf-8")
    entries = [_recipe_entry(project), *(_entry(project, stage) for stage in STAGES.values())]
    section = "\n".join(entries)
    return STAGES_SECTION.sub(lambda _: f"stages:\n{section}\n", text)


def write_pipeline(project: Project) -> bool:
    """Bring dvc.yaml up to date; whether it had to be changed."""
    return _updated(project.root / FILE_NAME, pipeline_text(project))


def write_resolved(project: Project, model: str) -> bool:
    """Bring the file of a model's resolved recipe up to date; whether it had to be changed.

    Raises:
        RecipeError: the recipe is wrong.
        RefragError: dvc.yaml does not name a recipe that it extends, so that DVC would not notice a change there.
    """
    path, recipe = project.resolved_recipe(model), project.recipe(model)
    pipeline = (project.root / FILE_NAME).read_text(encoding="utf-8")
    for name in _relative(project, extended(project.recipe_path(model))[1:]):
        if f"- {name}\n" not in pipeline:
            raise RefragError(f"{FILE_NAME} does not name {name}, which {model} extends; `refrag pipeline` adds it")
    text = f"# All settings of {model}, for DVC; `refrag recipes resolve {model}` writes it.\n"
    text += yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return _updated(path, text)


def _updated(path: Path, text: str) -> bool:
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    write_text(path, text)
    return True


def _recipe_entry(project: Project) -> str:
    """The stage that writes the resolved recipe: from the model's own, from any that another extends, and overrides."""
    known = {name for model in project.recipes() for name in extended(project.recipe_path(model))[1:]}
    watched = [f"models/{MODEL}/recipe.yaml", *_relative(project, sorted(known))]
    code = code_files(project.root, f"{PACKAGE}/project.py", leave_out=[f"{PACKAGE}/__init__.py"])
    lines = [
        f"  {RECIPE}:",
        '    matrix: {model: "${models}"}',
        "    desc: recipe with all that it extends and overrides",
        f"    cmd: ${{refrag}} recipes resolve {MODEL}",
        "    deps:",
        *(f"      - {path}" for path in (*watched, *_folded(project.root, code))),
        "    params:",
        f"      - overrides.{MODEL}",
        "    outs:",
        f"      - {_resolved(project)}: {{cache: false, persist: true}}",
    ]
    return "\n".join(lines) + "\n"


def _entry(project: Project, stage: Stage) -> str:
    sources = [f"data/sources/{MODEL}"] if stage.name == "corpus" else []
    inputs = [_content(project, name) for name in stage.inputs]
    lines = [
        f"  {stage.name}:",
        '    matrix: {model: "${models}"}',
        f"    desc: {stage.title}",
        f"    cmd: ${{refrag}} run {stage.name} --model {MODEL}",
        "    deps:",
        *(f"      - {path}" for path in (*sources, *inputs, *_folded(project.root, stage.code(project.root)))),
        "    params:",
        f"      - {_resolved(project)}: [{', '.join((*stage.sections, 'seed'))}]",
        "    outs:",
        f"      - {_content(project, stage.name)}: {{persist: true}}",
    ]
    return "\n".join(lines) + "\n"


def _content(project: Project, stage: str) -> str:
    return project.content(stage, MODEL).relative_to(project.root).as_posix()


def _resolved(project: Project) -> str:
    return project.resolved_recipe(MODEL).relative_to(project.root).as_posix()


def _relative(project: Project, files: Sequence[Path]) -> list[str]:
    return [file.relative_to(project.root).as_posix() for file in files]


def _folded(root: Path, files: tuple[str, ...]) -> list[str]:
    """The same files in fewer words: a folder stands for its modules where all of them are among the files."""

    def whole(folder: Path) -> bool:
        return all(module.relative_to(root).as_posix() in files for module in (root / folder).rglob("*.py"))

    folders = {folder for file in files for folder in Path(file).parents[:-1] if whole(folder)}
    shortest = (next((path for path in reversed(Path(file).parents) if path in folders), file) for file in files)
    return list(dict.fromkeys(map(str, shortest)))
