"""A full disk, a small real one: the run fails and says so, the last good version stays, and the next run mends it."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from assets.materialize import materialize_all
from refrag_platform.artifacts.manifest import published
from refrag_platform.errors import RefragError
from refrag_platform.history import dvc
from refrag_platform.project import Project
from tests.assets.conftest import MODEL, plant_stage, planted_project, use
from tests.planted import run

pytestmark = pytest.mark.slow
MEGABYTES = 64
FILLS_THE_DISK = """
figures = make(context)
(context.out / "large.bin").write_bytes(bytes(200_000_000))
return figures
"""
LARGE = """
import random
figures = make(context)
(context.out / "large.bin").write_bytes(random.Random(0).randbytes(10_000_000))
return figures
"""


@pytest.fixture
def on_small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A planted project on a disk of 64 MB; Dagster's own storage lies elsewhere, as a team's does."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        project = planted_project(disk)
        use(project, monkeypatch)
        home = shutil.copytree(project.root / ".dagster_home", tmp_path / "home")
        monkeypatch.setenv("DAGSTER_HOME", str(home))
        yield project
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_stage_that_fills_the_disk_says_so_and_leaves_the_last_good_version(
    on_small_disk: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    project = on_small_disk
    assert materialize_all(MODEL, ["corpus"])
    good, lock = published(project, "corpus", MODEL), (project.root / "dvc.lock").read_bytes()
    plant_stage(project, "corpus", FILLS_THE_DISK)
    capfd.readouterr()
    assert not materialize_all(MODEL, ["corpus"])
    said = capfd.readouterr().err.split("corpus failed: ")[1]
    assert "No space left on device" in said and f"The disk of {project.root} is full" in said
    assert good is not None and published(project, "corpus", MODEL) == good
    assert (project.root / "dvc.lock").read_bytes() == lock
    # What the failed run left makes room by itself.
    plant_stage(project, "corpus", "figures = make(context)\nreturn figures")
    assert materialize_all(MODEL, ["corpus"])
    assert dvc.is_recorded(project, "corpus", MODEL)


def test_an_artifact_that_the_cache_has_no_room_for_is_not_recorded(on_small_disk: Project) -> None:
    project = on_small_disk
    assert materialize_all(MODEL, ["corpus"])
    lock = (project.root / "dvc.lock").read_bytes()
    plant_stage(project, "corpus", LARGE)
    run(project.root, sys.executable, "-m", "refrag_platform", "run", "corpus", "--model", MODEL)
    ballast = project.root.parent / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb") as stream:
        stream.write(bytes(MEGABYTES * 1_000_000 * 2))
    with pytest.raises(RefragError, match="No space left on device"):
        dvc.record(project, "corpus", MODEL)
    ballast.unlink()
    assert (project.root / "dvc.lock").read_bytes() == lock
    made = published(project, "corpus", MODEL)
    assert made is not None and dvc.record(project, "corpus", MODEL) == made.hash
