"""A project here whose corpus is made, and folders that stand for other machines; stages are planted."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from refrag_platform import runner
from refrag_platform.bundle import landing
from refrag_platform.bundle.pieces import write_bundle
from refrag_platform.bundle.unbundle import unpack
from refrag_platform.bundle.work import work_to_do
from refrag_platform.project import Project
from tests.planted import MODEL

SendOut = Callable[..., Project]


@pytest.fixture
def home(planted_project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The project here; what others make is not checked, as nothing planted is."""
    monkeypatch.setattr(landing, "blocking_failures", lambda recipe, manifest, folder, inputs: [])
    runner.run_stage(planted_project, "corpus", MODEL)
    return planted_project


@pytest.fixture
def send_out(home: Project, tmp_path: Path) -> SendOut:
    """`send_out(NAME)`: the work until cpt exported here and unpacked in the folder NAME, as a project there."""

    def send(name: str = "there", models: Sequence[str] = (MODEL,)) -> Project:
        with work_to_do(home, models, "cpt") as work:
            write_bundle(work.members, work.facts, tmp_path / f"{name}.bundle", 30)
        unpack([tmp_path / f"{name}.bundle"], tmp_path / name)
        return Project(tmp_path / name)

    return send
