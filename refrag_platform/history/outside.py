"""What a stage reads that no earlier stage made: sources, tokenizer and question files, controls, a release, and
how it is launched.

DVC watches data/sources/NAME alone; a `path:` may lie anywhere, so the runner looks at the files themselves.
Folders of pretrained weights (`decoder.source`, `encoder.source`) and hub ids count by name.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from refrag_platform.artifacts.manifest import InputRecord
from refrag_platform.controls import trained_controls
from refrag_platform.corpus.held_out import question_file
from refrag_platform.corpus.question_files import named_files
from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.history.versions import release_named
from refrag_platform.project import Project
from refrag_platform.recipes import CONTROL_STAGES, Recipe
from refrag_platform.stages import SHIPPED, starts_from
from refrag_platform.training.launch_files import launch_files

TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "chat_template.jinja")


def outside_files(project: Project, stage: str, recipe: Recipe) -> list[InputRecord]:
    """Files that `stage` reads beside its inputs and, for the corpus, beside its sources; the missing left out."""
    return [*_read(project, stage, recipe), *_launched_with(project, stage, recipe)]


def _read(project: Project, stage: str, recipe: Recipe) -> list[InputRecord]:
    """What the stage's function reads."""
    if stage == "corpus":
        return _tokenizer(project, recipe)
    if stage in {"reconstruction", "cpt"}:
        tokenizer = _tokenizer(project, recipe) if stage == "reconstruction" or recipe.as_control else []
        questions = _asked(project, recipe) if stage == "cpt" else []
        return [*tokenizer, *_released(project, stage, recipe), *questions]
    if stage in {"policy", "finetuned"}:
        named = recipe.policy.questions
        if stage == "finetuned":
            named = [*recipe.finetuned.questions, *recipe.finetuned.summaries, *recipe.finetuned.distractors]
        return [*_named(project, named), *(_released(project, stage, recipe) if stage == "policy" else [])]
    if stage == "evaluation":
        records = _controls(project, recipe)
        asked = question_file(recipe.evaluation, project.recipe_path(recipe.name).parent)
        if asked is not None and asked.is_file():
            records.append(InputRecord.of(project.root, asked, str(asked)))
        return records
    return []


def _launched_with(project: Project, stage: str, recipe: Recipe) -> list[InputRecord]:
    """The accelerate config: how the ranks share the work decides how their sums are rounded."""
    try:
        files = launch_files(project.recipe_path(recipe.name).parent, stage, recipe)
    except RecipeError:  # The run says so.
        return []
    return [InputRecord.of(project.root, path, str(path)) for path in files.paths()] if files else []


def outside_digest(project: Project, stage: str, recipe: Recipe, files: list[InputRecord]) -> str:
    """One hash over `files` (of `outside_files`) and the corpus' sources; empty where there are none.

    A source that is not there hashes as such: what was made from it is stale, and the stage says what is missing.
    """
    hashes = [record.hash for record in files]
    if stage == "corpus":
        from refrag_platform.corpus.sources import sources_digest

        try:
            hashes.append(sources_digest(project, recipe))
        except RefragError as error:
            hashes.append(f"missing: {error}")
    return hashlib.md5("\n".join(hashes).encode(), usedforsecurity=False).hexdigest() if hashes else ""


def _released(project: Project, stage: str, recipe: Recipe) -> list[InputRecord]:
    """The released checkpoint that a training goes on from; none where it starts from scratch or can't be had."""
    version = starts_from(recipe, stage)
    if version is None:
        return []
    if version == SHIPPED:
        # It states the digest of every other file.
        manifest = project.shipped(recipe.name) / "manifest.json"
        return [InputRecord.of(project.root, manifest, str(manifest))] if manifest.is_file() else []
    try:
        digest = release_named(project, recipe.name, version).hashes[stage]
    except RefragError:
        return []
    return [InputRecord(path=f"{recipe.name}@{version}:{stage}", hash=digest)]


def _named(project: Project, names: list[str]) -> list[InputRecord]:
    """Files that a recipe names by their path from the project's root."""
    files = zip(named_files(project.root, names), names, strict=True)
    return [InputRecord.of(project.root, file, name) for file, name in files if file.is_file()]


def _asked(project: Project, recipe: Recipe) -> list[InputRecord]:
    """The question files of CPT's reading tasks."""
    return _named(project, recipe.cpt.reading.questions) if recipe.cpt.reading else []


def _tokenizer(project: Project, recipe: Recipe) -> list[InputRecord]:
    """tokenizer.json and the files beside it that say how it is used."""
    kind, _, name = (recipe.decoder.tokenizer or recipe.decoder.source).partition(":")
    if kind != "path":
        return []
    path = project.recipe_path(recipe.name).parent / Path(os.path.expandvars(name)).expanduser()
    folder = path.parent if path.is_file() else path
    files = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)})
    return [InputRecord.of(project.root, file, f"{name.removesuffix(path.name)}{file.name}") for file in files]


def _controls(project: Project, recipe: Recipe) -> list[InputRecord]:
    """The trained controls that the evaluation takes."""
    controls = [item for stage in CONTROL_STAGES for item in trained_controls(project, recipe, stage).matched.items()]
    return [
        InputRecord(path=f"models/{manifest.model}/{manifest.stage}/content", hash=manifest.hash)
        for _, manifest in sorted(controls, key=lambda control: control[0])
    ]
