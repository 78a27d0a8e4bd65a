"""Projects whose stages make small real artifacts in no time; Dagster, DVC, checks and processes are the real ones."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterInstance

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.dials import add_model
from refrag_platform.history import dvc
from refrag_platform.project import Project
from refrag_platform.stages import STAGES
from tests.conftest import ROOT, copy_project, init_repository, set_remote

# The code location was loaded for the clone's own models; in planted projects one of them has tiny's recipe.
MODEL = Project(ROOT).models()[0]
# What most tests run: the first artifact and one that is made from it.
FIRST_TWO = ("corpus", "reconstruction")


def plant_stage(project: Project, stage: str, body: str = "return make(context)") -> None:
    """Replace a stage's function in the project's copy of the code."""
    module, name = STAGES[stage].function.split(":")
    path = project.root / (module.replace(".", "/") + ".py")
    lines = ["from planted import *", "", "", f"def {name}(context):", *(f"    {line}" for line in body.splitlines())]
    path.write_text("\n".join(lines) + "\n")


def planted_project(folder: Path) -> Project:
    """A repository in which every stage is planted; DAGSTER_HOME lies inside, as in a clone."""
    project = copy_project(folder / "project")
    shutil.rmtree(project.recipe_path(MODEL).parent)
    shutil.copytree(project.recipe_path("tiny").parent, project.recipe_path(MODEL).parent)
    recipe = project.recipe_path(MODEL).read_text().replace("name: tiny", f"name: {MODEL}")
    project.recipe_path(MODEL).write_text(recipe)
    (project.root / "params.yaml").write_text("models: []\n")
    add_model(project, MODEL)
    shutil.copy(ROOT / "tests" / "quality" / "content.py", project.root / "planted.py")
    for stage in STAGES:
        plant_stage(project, stage)
    (project.root / ".dagster_home").mkdir()
    shutil.copy(ROOT / ".dagster_home" / "dagster.yaml", project.root / ".dagster_home")
    return init_repository(project)


def use(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process, and those that it starts, at the project."""
    monkeypatch.setenv("REFRAG_ROOT", str(project.root))
    monkeypatch.setenv("DAGSTER_HOME", str(project.root / ".dagster_home"))


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A planted project with nothing made yet."""
    project = planted_project(tmp_path)
    use(project, monkeypatch)
    return project


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A planted project after one run of its first two stages; tests only look at it."""
    from assets.materialize import materialize_all

    project = planted_project(tmp_path_factory.mktemp("made"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(project, monkeypatch)
        assert materialize_all(MODEL, FIRST_TWO)
        yield project


@pytest.fixture
def made_copy(made: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of its own of that project, Dagster's history and DVC's remote included."""
    project = copy_planted(made, tmp_path / "copy")
    use(project, monkeypatch)
    return project


def copy_planted(project: Project, folder: Path) -> Project:
    """Copy a planted project and DVC's remote beside it."""
    shutil.copytree(project.root.parent, folder, symlinks=True)
    copy = Project(folder / "project")
    set_remote(copy, folder / "remote")
    return copy


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    """The Dagster instance of the project in use."""
    with DagsterInstance.get() as found:
        yield found


def accept(project: Project, stage: str, model: str = MODEL) -> None:
    """Make manifest and dvc.lock agree with content that was changed by hand."""
    folder = project.stage_dir(stage, model)
    manifest = Manifest.read(folder)
    manifest.model_copy(update={"hash": folder_digest(folder / "content")}).write(folder)
    dvc.record(project, stage, model)


def start_pipeline(project: Project) -> subprocess.Popen[str]:
    """The pipeline in a process of its own, as `make demo` has it."""
    command = [sys.executable, "-m", "assets.materialize", MODEL]
    return subprocess.Popen(command, cwd=project.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
