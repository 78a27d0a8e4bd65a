"""Shared fixtures: a copy of the project that tests may write into."""

import gc
import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from refrag_platform.dials import add_model
from refrag_platform.project import Project
from tests.planted import MODEL, make_all, plant, record_all

ROOT = Path(__file__).resolve().parent.parent
DVC_FILES = (".dvcignore", ".dvc/config", ".dvc/.gitignore")
# An accelerate config: two processes on this machine, on any free port.
ZERO2 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {"zero_stage": 2},
    "num_machines": 1,
    "num_processes": 2,
    "main_process_port": 0,
}
SIGTERM = signal.getsignal(signal.SIGTERM)
# Each test's project keeps its Bentos itself; the Makefile's store is the checkout's.
os.environ.pop("BENTOML_HOME", None)


def pytest_collection_finish() -> None:
    """What the tests import is there to stay: looking through it for garbage would take half a second each time."""
    gc.freeze()


def pytest_runtest_setup() -> None:
    """Weights that a test draws at random, or its fixtures do, are the same whatever tests ran before it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def sigterm() -> None:
    """SIGTERM does what it did at the start: Dagster maps it to SIGINT, which workers of the tests ignore."""
    signal.signal(signal.SIGTERM, SIGTERM)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project of its own: the library's source, the recipes and params.yaml, no artifacts."""
    return copy_project(tmp_path / "project")


@pytest.fixture
def repository(project: Project) -> Project:
    """The project as a Git and DVC repository with one commit and no artifacts."""
    return init_repository(project)


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
    record_all(project)
    return project.root


@pytest.fixture
def recorded(recorded_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of its own of that repository, in which the stages are still planted."""
    plant(monkeypatch)
    shutil.copytree(recorded_once.parent, tmp_path / "copy", symlinks=True)
    project = Project(tmp_path / "copy" / "project")
    set_remote(project, tmp_path / "copy" / "remote")
    return project


def load_script(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A file of scripts/ as a module; scripts import each other by name."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module(name)


def init_repository(project: Project) -> Project:
    """Make a copied project a Git repository; DVC's remote lies beside it, not in the user's home."""
    for command in (
        ["init", "--quiet", "--initial-branch", "main"],
        ["config", "user.name", "Tester"],
        ["config", "user.email", "tester@localhost"],
        ["add", "--all"],
        ["commit", "--quiet", "--message", "The project"],
    ):
        subprocess.run(["git", *command], cwd=project.root, check=True)
    set_remote(project, project.root.parent / "remote")
    return project


def set_remote(project: Project, folder: Path) -> None:
    """What `refrag remote set` does, without half a second of DVC."""
    (project.root / ".dvc" / "config.local").write_text(f"['remote \"default\"']\n    url = {folder}\n")


def copy_project(target: Path) -> Project:
    """Copy what a clone would hold (code, recipes, pipeline files), without artifacts."""
    target.mkdir(parents=True)
    for name in ("refrag_platform", "assets"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    (target / ".dvc").mkdir()
    for name in ("params.yaml", "dvc.yaml", "bentofile.yaml", "pyproject.toml", ".gitignore", *DVC_FILES):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, target / name)
    shutil.copytree(ROOT / "models" / "accelerate", target / "models" / "accelerate")
    for recipe in (ROOT / "models").glob("*/recipe.yaml"):
        folder = target / "models" / recipe.parent.name
        folder.mkdir(parents=True)
        for file in recipe.parent.iterdir():
            if file.is_file():
                shutil.copy(file, folder / file.name)
        sources = target / "data" / "sources" / recipe.parent.name
        sources.mkdir(parents=True)
        (sources / ".gitkeep").touch()
    project = Project(target)
    add_model(project, "tiny")  # the tests' model, which a clone does not run by itself
    return project
