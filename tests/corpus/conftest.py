"""A corpus stage to run over sources that a test writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refrag_platform.corpus.build import build_corpus
from refrag_platform.project import Project
from refrag_platform.recipes import read_recipe
from refrag_platform.stages import StageContext
from tests.conftest import copy_project

Build = Callable[..., StageContext]


@pytest.fixture
def build(project: Project, tmp_path: Path) -> Build:
    """Runs the corpus stage of `tiny` with changed settings; the context has `metrics` beside what a stage gets."""
    return builder(project, tmp_path)


def builder(project: Project, folder: Path) -> Build:
    runs = 0

    def run(**corpus: Any) -> StageContext:
        nonlocal runs
        runs += 1
        recipe = read_recipe(project.recipe_path("tiny"), {"corpus": corpus})
        beside = folder / f"run-{runs}"
        for name in ("content", "work"):
            (beside / name).mkdir(parents=True)
        context = StageContext(project, recipe, "corpus", {}, beside / "content", beside / "work", beside)
        (beside / "metrics").write_text(repr(build_corpus(context)))
        return context

    return run


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """content/ of the shipped tiny recipe's corpus: 24 countries."""
    folder = tmp_path_factory.mktemp("tiny-corpus")
    return builder(copy_project(folder / "project"), folder)().out


@pytest.fixture
def texts(project: Project) -> Path:
    """data/sources/tiny with forty small text files, enough for all three splits."""
    folder = project.source_dir("tiny")
    for number in range(40):
        (folder / f"note-{number}.txt").write_text(f"Note {number} is about ships. It names harbour {number * 7}.\n")
    return folder
