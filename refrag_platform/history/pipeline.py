"""The stages of dvc.yaml, written from the registry: what else is in the file stays. Run: `refrag pipeline`."""

from __future__ import annotations

import re
from pathlib import Path

from refrag_platform.files import write_text
from refrag_platform.project import Project
from refrag_platform.stages import STAGES, Stage

FILE_NAME = "dvc.yaml"
# DVC puts each model of params.yaml here.
MODEL = "${item.model}"
# Up to the next line that is not indented.
STAGES_SECTION = re.compile(r"^stages:\n.*?(?=^\S|\Z)", re.MULTILINE | re.DOTALL)


def pipeline_text(project: Project) -> str:
    """What dvc.yaml has to be: the file as it is, its section `stages` written anew."""
    text = (project.root / FILE_NAME).read_text(encoding="utf-8")
    section = "".join(f"\n{_entry(project, stage)}" for stage in STAGES.values()).removeprefix("\n")
    return STAGES_SECTION.sub(lambda _: f"stages:\n{section}\n", text)


def write_pipeline(project: Project) -> bool:
    """Bring dvc.yaml up to date; whether it had to be changed."""
    path, text = project.root / FILE_NAME, pipeline_text(project)
    if path.read_text(encoding="utf-8") == text:
        return False
    write_text(path, text)
    return True


def _entry(project: Project, stage: Stage) -> str:
    sources = [f"data/sources/{MODEL}"] if stage.name == "corpus" else []
    inputs = [_content(project, name) for name in stage.inputs]
    lines = [
        f"  {stage.name}:",
        '    matrix: {model: "${models}"}',
        f"    desc: {stage.title}",
        f"    cmd: ${{run}} {stage.name} --model {MODEL}",
        "    deps:",
        *(f"      - {path}" for path in (*sources, *inputs, *_folded(project.root, stage.code(project.root)))),
        "    params:",
        f"      - models/{MODEL}/recipe.yaml: [{', '.join((*stage.sections, 'seed'))}]",
        *(f"      - overrides.{MODEL}.{section}" for section in stage.sections),
        "    outs:",
        f"      - {_content(project, stage.name)}: {{persist: true}}",
    ]
    return "\n".join(lines) + "\n"


def _content(project: Project, stage: str) -> str:
    return project.content(stage, MODEL).relative_to(project.root).as_posix()


def _folded(root: Path, files: tuple[str, ...]) -> list[str]:
    """The same files in fewer words: a folder stands for its modules where all of them are among the files."""

    def whole(folder: Path) -> bool:
        return all(module.relative_to(root).as_posix() in files for module in (root / folder).rglob("*.py"))

    folders = {folder for file in files for folder in Path(file).parents[:-1] if whole(folder)}
    shortest = (next((path for path in reversed(Path(file).parents) if path in folders), file) for file in files)
    return list(dict.fromkeys(map(str, shortest)))
