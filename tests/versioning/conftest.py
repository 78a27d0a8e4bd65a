"""Projects whose stages are planted, see planted.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from refrag_platform.project import Project
from refrag_platform.stages import STAGES
from refrag_platform.versioning import dvc
from tests.conftest import copy_project, init_repository, set_remote
from tests.versioning.planted import MODEL, make_all, plant, run


@pytest.fixture
def planted_project(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose stages are planted, with one source document and nothing made yet."""
    plant(monkeypatch)
    (project.source_dir(MODEL) / "notes.txt").write_text("The river rises in the north.")
    return project


@pytest.fixture(scope="session")
def recorded_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which every stage of one model was made and recorded."""
    project = init_repository(copy_project(tmp_path_factory.mktemp("recorded") / "project"))
    (project.source_dir(MODEL) / "notes.txt").write_text("The river rises in the north.")
    with pytest.MonkeyPatch.context() as monkeypatch:
        plant(monkeypatch)
        make_all(project)
    # What `record` does, for all stages at once.
    run(project.root, "dvc", "commit", "--force", *(dvc.target(stage, MODEL) for stage in STAGES))
    return project.root


@pytest.fixture
def recorded(recorded_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of its own of that repository, in which the stages are still planted."""
    plant(monkeypatch)
    shutil.copytree(recorded_once.parent, tmp_path / "copy", symlinks=True)
    project = Project(tmp_path / "copy" / "project")
    set_remote(project, tmp_path / "copy" / "remote")
    return project
