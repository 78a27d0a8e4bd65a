"""What another machine needs to run stages: code, recipe, the artifacts and files that they read, what was begun here.

Unpacked, a bundle is a project of its own: the same inputs, settings and code have the same fingerprint there, so that
what it makes is current here.
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refrag_platform.artifacts import publication
from refrag_platform.artifacts.manifest import FILE_NAME
from refrag_platform.bundle.pieces import Members
from refrag_platform.bundle.unbundle import SITE_PACKAGES, WHEELS
from refrag_platform.corpus.passage_rows import copy_path, write_copy
from refrag_platform.dials import DIALS, only_models
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.history.freshness import dependencies
from refrag_platform.history.git import git_commit
from refrag_platform.history.outside import outside_files
from refrag_platform.history.status import status
from refrag_platform.imports import PACKAGE
from refrag_platform.project import Project
from refrag_platform.recipes import BESIDE, Recipe, extended
from refrag_platform.stages import SHIPPED, STAGES, inputs_of, stages_of, starts_from

# They read sources, or build what lives in a store of this machine.
STAYS_HERE = ("corpus", "package")


@dataclass
class BundleContents:
    """Files by the path that they have in the bundle, what bundle.json says of them, and what the user is told."""

    members: dict[str, Path | bytes] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@contextmanager
def work_to_do(
    project: Project, models: Sequence[str], until: str, wheels: Path | None = None
) -> Iterator[BundleContents]:
    """All that another machine needs to make the artifacts `until`; no stage of these runs here within the block.

    Args:
        models: what several of them read, as a model and its controls do, is taken along once.
        until: of a control, the stages up to there that it has of its own.
        wheels: a folder of wheels to take along, for the other machine's Python.

    Raises:
        ArtifactError: an artifact that is made here alone is not current.
        RefragError: there is nothing to do, a stage is running, or a file that it reads lies outside the project.
    """
    wanted = {model: _stages_to_run(project, model, until) for model in models}
    runs = {model: stages for model, stages in wanted.items() if stages}
    if not runs:
        raise RefragError(
            f"nothing to do: {until} of {', '.join(models)} is current, and so is all that it is made from"
        )
    work = BundleContents(facts={"kind": "work", "models": runs, "commit": git_commit(project.root)})
    members = work.members
    members |= files_below(project, project.root / PACKAGE)
    folders = dict.fromkeys(project.recipe_path(model).parent.name for model in runs)
    members[DIALS] = only_models(project, folders).encode()
    with ExitStack() as locks, tempfile.TemporaryDirectory(prefix="refrag-") as scratch:
        for model, stages in runs.items():
            recipe = project.recipe(model)
            members |= _recipe_files(project, model)
            for stage in stages:
                locks.enter_context(publication.only_runner(project.work_dir(stage, model)))
                members |= _inputs(project, stage, model, stages)
                members |= _files_read(project, stage, recipe)
                members |= _begun(project, stage, recipe, stages)
            if not _is_among(wheels, "pyarrow"):
                members |= _plain_passages(project, model, Path(scratch))
            for source in _weights(recipe, stages):
                members |= _weights_of(project, source, project.recipe_path(model).parent, wheels, work.notes)
        if wheels is not None:
            members |= _wheels(wheels)
        yield work


def _recipe_files(project: Project, model: str) -> dict[str, Path | bytes]:
    """The recipe with what lies beside it and beside those that it extends, and what runs set over it."""
    control = project.control(model)
    files = [project.run_overrides(name) for name in (model, *([control.model] if control else []))]
    for recipe in extended(project.recipe_path(model)):
        files += [file for file in recipe.parent.iterdir() if not file.name.startswith(".")]
    return {_inside(project, file): file for file in files if file.is_file()}


def _inputs(project: Project, stage: str, model: str, stages: list[str]) -> dict[str, Path | bytes]:
    """The artifacts that a stage reads and that `stages` don't make, with their manifests."""
    files: dict[str, Path | bytes] = {}
    for name in inputs_of(project, STAGES[stage], model):
        if name not in stages:
            files |= files_below(project, project.content(name, model))
            manifest = project.stage_dir(name, model) / FILE_NAME
            files[_inside(project, manifest)] = manifest
    return files


def _plain_passages(project: Project, model: str, scratch: Path) -> dict[str, Path | bytes]:
    """The copy of the corpus' passages that is read without pyarrow."""
    corpus = project.content("corpus", model)
    copy = scratch / project.recipe_path(model).parent.name
    if not copy.exists():
        write_copy(corpus, copy)
    return {_inside(project, copy_path(corpus)): copy}


def files_below(project: Project, folder: Path) -> dict[str, Path | bytes]:
    """Every file of a folder of the project, by its path from the root; links are followed as its hash does."""
    return {
        _inside(project, Path(base) / name): Path(base) / name
        for base, _, names in os.walk(folder)
        for name in names
        if Path(base).name != "__pycache__"
    }


def state_of(project: Project, stage: str, model: str) -> Members:
    """What a stage that was stopped goes on from: its newest complete checkpoints, and the fingerprint of its run."""
    from refrag_platform.training.core import checkpoint

    work = project.work_dir(stage, model)
    mark = work / "fingerprint"
    if not mark.is_file() or not (work / "state").is_dir():
        return {}
    newest = checkpoint.newest(work / "state")
    kept = {
        name: file
        for name, file in files_below(project, work / "state").items()
        if isinstance(file, Path)
        and (checkpoint.FOLDER not in file.parts or any(file.is_relative_to(folder) for folder in newest))
    }
    return {**kept, _inside(project, mark): mark} if kept else {}


def _stages_to_run(project: Project, model: str, until: str) -> list[str]:
    """The stages that `until` needs and that are not current, in the pipeline's order."""
    if until not in STAGES or until in STAYS_HERE:
        others = ", ".join(name for name in STAGES if name not in STAYS_HERE)
        raise RefragError(f"--until is {until!r}; on another machine these stages can run: {others}")
    order = list(STAGES)
    last = [stage.name for stage in stages_of(project, model) if order.index(stage.name) <= order.index(until)][-1:]
    wanted, waiting = set(), last
    while waiting:
        wanted.add(name := waiting.pop())
        waiting += inputs_of(project, STAGES[name], model)
    stages = [row.stage for row in status(project, model) if row.stage in wanted and row.state != "current"]
    for name in STAYS_HERE:
        if name in stages:
            raise ArtifactError(
                f"the {STAGES[name].title} of {model} is not current, and is made here, where its sources are: "
                f"`refrag run {name} --model {project.recipe_path(model).parent.name}`"
            )
    return stages


def _files_read(project: Project, stage: str, recipe: Recipe) -> dict[str, Path | bytes]:
    """What a stage reads beside its inputs: question files, the release, the tokenizer."""
    start = starts_from(recipe, stage)
    if start not in (None, SHIPPED):
        raise RefragError(
            f"{stage}.continue_from of {recipe.name} is {start!r}: a released version is looked up in Git, which the "
            "other machine lacks; run it here, or train in full"
        )
    files: dict[str, Path | bytes] = {}
    if start == SHIPPED:
        files |= files_below(project, project.shipped(recipe.name))
    for record in outside_files(project, stage, recipe):
        files |= _file_or_folder(project, project.root / record.path, f"{stage} of {recipe.name} reads {record.path}")
    for name in _files_named(recipe.section(stage)):
        _require_portable(name, f"{stage} of {recipe.name} reads {name}")
    return files


def _files_named(value: Any, key: str = "") -> Iterator[str]:
    """Files and folders that a recipe's section names, as it names them."""
    if isinstance(value, dict):
        for inner, named in value.items():
            yield from _files_named(named, inner)
    elif isinstance(value, list):
        for named in value:
            yield from _files_named(named, key)
    elif isinstance(value, str) and key in {*BESIDE, "questions", "summaries", "distractors"}:
        yield value


def _require_portable(name: str, what: str) -> None:
    """Refuse a path that leads elsewhere on another machine."""
    if "$" in name or Path(name).expanduser().is_absolute():
        raise RefragError(
            f"{what}: another machine has other variables, another home and another root folder; copy it into the "
            "project and give a relative path without variables"
        )


def _begun(project: Project, stage: str, recipe: Recipe, stages: list[str]) -> Members:
    """The state of a stage that was stopped here, if a run would go on from it now."""
    if any(name in stages for name in inputs_of(project, STAGES[stage], recipe.name)):
        return {}
    mark = project.work_dir(stage, recipe.name) / "fingerprint"
    now = dependencies(project, stage, recipe).fingerprint
    return state_of(project, stage, recipe.name) if mark.is_file() and mark.read_text() == now else {}


def _weights(recipe: Recipe, stages: list[str]) -> list[str]:
    """The sources of pretrained weights that these stages load."""
    taken = any(starts_from(recipe, stage) == SHIPPED for stage in stages)
    sources = {recipe.decoder.source, recipe.decoder.tokenizer, recipe.encoder.source}
    # A control starts at cpt.
    first = "cpt" if recipe.as_control else "reconstruction"
    loaded = sources if taken or first in stages else set()
    ranking = {"policy"} if recipe.policy.relevance else set()
    if recipe.system == "plain":
        ranking.add("finetuned")
    if {"chunks", *ranking} & set(stages):
        loaded |= {recipe.chunks.retriever}
    return sorted(source for source in loaded if source is not None and ":" in source)


def _weights_of(
    project: Project, source: str, base: Path, wheels: Path | None, notes: list[str]
) -> dict[str, Path | bytes]:
    """Files of a recipe's source of weights: a folder of the project, or an installed package that no wheel brings."""
    kind, _, name = source.partition(":")
    if kind == "path":
        path = base / Path(os.path.expandvars(name)).expanduser()
        files = _file_or_folder(project, path, f"{source} is {path}")
        _require_portable(name, f"{source} is {path}")
        return files
    if kind == "hub":
        notes.append(f"{source} is not in the bundle: the other machine needs a network, or the hub's cache with it")
        return {}
    files = _installed(name, wheels)
    # transformers reads such a file by a package that hardly any machine has.
    return files | _installed("gguf", wheels) if any(file.endswith(".gguf") for file in files) else files


def _installed(name: str, wheels: Path | None) -> dict[str, Path | bytes]:
    """The files of an installed package, which must be pure Python or data; none where a wheel brings it."""
    if _is_among(wheels, name):
        return {}
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise RefragError(f"package {name} is not installed; install it, or put its wheel into --wheels") from None
    inside = [file for file in package.files or [] if ".." not in file.parts and file.suffix != ".pyc"]
    return {f"{SITE_PACKAGES}/{file.as_posix()}": Path(str(file.locate())) for file in inside}


def _wheels(folder: Path) -> dict[str, Path | bytes]:
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if not wheels:
        raise RefragError(f"--wheels is {folder}, and there is no wheel (*.whl) in it; `pip download -d {folder} ...`")
    return {f"{WHEELS}/{wheel.name}": wheel for wheel in wheels}


def _is_among(wheels: Path | None, package: str) -> bool:
    files = wheels.glob("*.whl") if wheels is not None else []
    return any(_normal(wheel.name.split("-")[0]) == _normal(package) for wheel in files)


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _file_or_folder(project: Project, path: Path, what: str) -> dict[str, Path | bytes]:
    path = Path(os.path.normpath(path))
    if not path.exists() or not path.is_relative_to(project.root):
        raise RefragError(
            f"{what}, which is not a file or folder of {project.root}: only what lies in the project has the same "
            "place on another machine; copy it into the project and name it there"
        )
    return files_below(project, path) if path.is_dir() else {_inside(project, path): path}


def _inside(project: Project, file: Path) -> str:
    return file.relative_to(project.root).as_posix()
