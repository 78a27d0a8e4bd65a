"""`refrag gc`: what a release, the last runs, the workspace or a served Bento needs stays; the rest goes."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from refrag_platform import runner
from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.artifacts.publication import only_runner
from refrag_platform.errors import RefragError
from refrag_platform.history import dvc, retention, tags
from refrag_platform.history.cache import Cache
from refrag_platform.history.git import Git
from refrag_platform.history.pipeline import RECIPE
from refrag_platform.history.runs import commit_run
from refrag_platform.history.versions import releases
from refrag_platform.project import Project
from refrag_platform.releases.restore import restore
from refrag_platform.serving import bento
from refrag_platform.stages import STAGES
from tests.command import refrag
from tests.conftest import copy_project, init_repository
from tests.planted import MODEL, make_all, record_all, run
from tests.planted_store import plant_bento, plant_packages

# Three runs of all stages, recorded.
pytestmark = pytest.mark.slow
TARGETS = [dvc.target(stage, MODEL) for stage in (RECIPE, *STAGES)]
TEXTS = ("north", "south", "west")
LAST = len(TEXTS) - 1


@dataclass
class Runs:
    """A project with three recorded runs of one model: the first is released, the last is in place."""

    project: Project
    hashes: list[dict[str, str]]
    bentos: list[str]

    def objects(self, number: int) -> set[str]:
        """All hashes of a run that are in DVC's cache, listings' files included."""
        cache = cache_of(self.project)
        folders = set(self.hashes[number].values())
        return {hash for folder in folders for hash in (folder, *cache.listing(folder).values())}


def cache_of(project: Project) -> Cache:
    return Cache(project.root / ".dvc" / "cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    project = init_repository(copy_project(tmp_path_factory.mktemp("runs") / "project"))
    found = Runs(project, [], [])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runner, "_check", lambda manifest, context, work: None)
        plant_packages(monkeypatch)
        for number, text in enumerate(TEXTS):
            (project.source_dir(MODEL) / "notes.txt").write_text(f"The river rises in the {text}.")
            found.hashes.append(make_all(project))
            found.bentos.append(bento.Package.of(project, MODEL).bento_tag)
            record_all(project)
            commit = commit_run(project, MODEL, text)
            if number == 0:
                git = Git(project.root)
                tags.register(git, MODEL, commit, "first")
                tags.assign(git, MODEL, commit, "first")
            tables = project.root / "data" / MODEL / "lance"
            (tables / found.hashes[-1]["chunks"].removesuffix(".dir") / "passages.lance").mkdir(parents=True)
        (tables / ".lock").touch()
    return found


@pytest.fixture
def runs(made: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """A copy of its own of these runs; the working directory is the project."""
    monkeypatch.setattr(runner, "_check", lambda manifest, context, work: None)
    plant_packages(monkeypatch)
    shutil.copytree(made.project.root, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    return Runs(Project(tmp_path / "project"), made.hashes, made.bentos)


def everything(project: Project) -> set[str]:
    return set(cache_of(project).hashes())


def files(project: Project) -> set[str]:
    return {str(path) for path in project.root.rglob("*") if ".git/" not in str(path) and "/tmp/" not in str(path)}


def test_released_and_last_runs_stay_the_others_go(runs: Runs) -> None:
    needed = runs.objects(0) | runs.objects(LAST)
    assert runs.objects(1) - needed
    result = refrag("gc", "--keep", "1")
    assert everything(runs.project) == needed
    assert "freed" in result.stdout and f"models/{MODEL}/cpt {runs.hashes[1]['cpt']}" in result.stdout
    again = retention.plan(runs.project, 1)
    assert again.garbage == []


def test_a_released_commit_is_restored_from_what_is_left(runs: Runs, tmp_path: Path) -> None:
    retention.collect(runs.project, 0)
    run(tmp_path, "git", "clone", "--quiet", str(runs.project.root), "clone")
    clone = Project(tmp_path / "clone")
    run(clone.root, "git", "checkout", "--quiet", f"{MODEL}@v1.0.0")
    run(clone.root, "dvc", "cache", "dir", "--local", str(runs.project.root / ".dvc" / "cache"))
    run(clone.root, "dvc", "checkout")
    for stage in STAGES:
        assert folder_digest(clone.content(stage, MODEL)) == runs.hashes[0][stage]
        assert Manifest.read(clone.stage_dir(stage, MODEL)).hash == runs.hashes[0][stage]
    (release,) = releases(runs.project, MODEL)
    assert restore(runs.project, release) == ["finetuned", "chunks", "policy", "package"]
    assert bento.Package.of(runs.project, MODEL).bento_tag == runs.bentos[0]


@pytest.mark.parametrize(("last", "kept"), [(0, {0, 2}), (1, {0, 2}), (2, {0, 1, 2}), (9, {0, 1, 2})])
def test_the_last_n_runs_stay(runs: Runs, last: int, kept: set[int]) -> None:
    plan = retention.plan(runs.project, last)
    listed = {item.name.split()[-1] for item in plan.garbage if item.kind == "artifact"}
    gone = {hash for number in {0, 1, 2} - kept for hash in runs.hashes[number].values()}
    assert listed == gone
    assert not [item for item in plan.garbage if item.kind == "files"]


def test_a_dry_run_lists_the_bytes_that_go_and_removes_nothing(runs: Runs) -> None:
    before, objects = files(runs.project), everything(runs.project)
    result = refrag("gc", "--keep", "1", "--dry-run", "--json")
    listed = json.loads(result.stdout)
    assert files(runs.project) == before and listed["removed"] is False
    cache = cache_of(runs.project)
    size = {hash: cache.size(hash) for hash in objects}
    plan = retention.collect(runs.project, 1)
    assert [(item.kind, item.name, item.bytes) for item in plan.garbage] == [
        (item["kind"], item["name"], item["bytes"]) for item in listed["garbage"]
    ]
    freed = sum(size[hash] for hash in objects - everything(runs.project))
    assert freed == sum(item.bytes for item in plan.garbage if item.kind in {"artifact", "files"})


def in_store(project: Project, shelf: str) -> set[str]:
    folders = (path for path in (bento.home(project) / shelf).glob("*/*") if path.is_dir())
    return {f"{path.parent.name}:{path.name}" for path in folders}


def test_bentos_and_tables_go_with_the_runs_that_name_them(runs: Runs) -> None:
    foreign = plant_bento(runs.project, "theirs:1", "theirs:1")
    (foreign / "bento.yaml").write_text((foreign / "bento.yaml").read_text().replace("refrag-platform", "theirs"))
    retention.collect(runs.project, 1)
    kept = {runs.bentos[0], runs.bentos[LAST]}
    assert in_store(runs.project, "bentos") == {*kept, "theirs:1"}
    assert in_store(runs.project, "models") == kept
    assert str(bento.model_store(runs.project).get(f"refrag-{MODEL}:latest").tag) == runs.bentos[LAST]
    tables = runs.project.root / "data" / MODEL / "lance"
    named = {runs.hashes[number]["chunks"].removesuffix(".dir") for number in (0, LAST)}
    assert {path.name for path in tables.iterdir()} == {*named, ".lock"}


def test_a_bento_that_is_being_served_stays_with_its_model(runs: Runs) -> None:
    served = runs.bentos[1]
    command = [sys.executable, "-c", "print('up', flush=True); input()", "serve", served]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline() == "up\n"
        plan = retention.collect(runs.project, 1)
        server.communicate("\n")
    assert plan.tags[served] == "being served"
    assert in_store(runs.project, "bentos") == in_store(runs.project, "models") == set(runs.bentos)
    after = retention.plan(runs.project, 1)
    assert [item.name for item in after.garbage if item.kind in {"bento", "model"}] == [served, served]


def test_nothing_goes_while_a_model_is_being_packaged(runs: Runs) -> None:
    before = files(runs.project)
    with (
        only_runner(runs.project.work_dir("package", MODEL)),
        pytest.raises(RefragError, match="another process is running"),
    ):
        retention.collect(runs.project, 0)
    assert files(runs.project) == before


@pytest.mark.slow
def test_what_is_in_place_stays_with_all_that_it_was_made_from(runs: Runs) -> None:
    run(runs.project.root, "git", "branch", "-D", f"runs/{MODEL}")
    (runs.project.source_dir(MODEL) / "notes.txt").write_text("The river is dry.")
    stages = ("corpus", "reconstruction", "cpt")
    for stage in stages:
        runner.run_stage(runs.project, stage, MODEL)
    record_all(runs.project, *stages)
    # Nothing names the old reconstruction and corpus any more but the old checkpoint that the policy was made from.
    plan = retention.collect(runs.project, 0)
    assert plan.kept[runs.hashes[LAST]["reconstruction"]].startswith("behind")
    assert runs.objects(LAST) <= everything(runs.project)
    run(runs.project.root, "dvc", "checkout", "--force", *TARGETS)


@pytest.mark.slow
def test_a_model_that_params_yaml_no_longer_names_keeps_its_artifacts(runs: Runs) -> None:
    dials = runs.project.root / "params.yaml"
    dials.write_text(dials.read_text().replace(f", {MODEL}]", "]"))
    assert MODEL not in runs.project.models()
    retention.collect(runs.project, 1)
    assert everything(runs.project) == runs.objects(0) | runs.objects(LAST)


def test_a_cache_that_others_may_use_is_left_alone(runs: Runs, tmp_path: Path) -> None:
    shutil.move(runs.project.root / ".dvc" / "cache", tmp_path / "shared")
    run(runs.project.root, "dvc", "cache", "dir", "--local", str(tmp_path / "shared"))
    plan = retention.plan(runs.project, 0)
    assert not [item for item in plan.garbage if item.kind in {"artifact", "files"}]
    assert str(tmp_path / "shared") in plan.notes[0] and "left alone" in plan.notes[0]


def test_a_store_that_others_may_use_is_left_alone(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(bento.home(runs.project), tmp_path / "bentoml")
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    plan = retention.plan(runs.project, 0)
    assert not [item for item in plan.garbage if item.kind in {"bento", "model"}]
    assert any(str(tmp_path / "bentoml") in note for note in plan.notes)


def test_a_damaged_dvc_lock_stops_it_all(runs: Runs) -> None:
    (runs.project.root / "dvc.lock").write_text("schema: '2.0\nstages:")
    before = everything(runs.project)
    with pytest.raises(RefragError, match=r"dvc\.lock can.t be read"):
        retention.collect(runs.project, 0)
    assert everything(runs.project) == before
