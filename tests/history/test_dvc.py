"""DVC knows which bytes an artifact is, and what would change them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from refrag_platform import runner
from refrag_platform.artifacts.manifest import FILE_NAME, Manifest, published
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.history import dvc
from refrag_platform.history.pipeline import RECIPE, write_pipeline, write_resolved
from refrag_platform.project import Project
from refrag_platform.stages import STAGES
from tests.planted import MODEL, make_all, override, plant, run

TARGETS = [dvc.target(stage, MODEL) for stage in (RECIPE, *STAGES)]
RECORD = """
import sys
from pathlib import Path
from refrag_platform.project import Project
from refrag_platform.history import dvc
root, stage, model = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
dvc.record(Project(Path(root)), stage, model)
"""
HOLD_THE_LOCK = """
import sys, time
from dvc.repo import Repo
repo = Repo()
with repo.lock:
    print("held", flush=True)
    time.sleep(5)
"""


def changed(project: Project) -> set[str]:
    """The model's stages that DVC would run again for a reason of their own, its recipe put together."""
    write_resolved(project, MODEL)
    status = json.loads(run(project.root, "dvc", "status", "--json", *TARGETS))
    return {target.removesuffix(f"@{MODEL}") for target in status}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new))


def test_a_recorded_stage_has_its_manifests_hash_in_dvc_lock_and_a_clean_status(recorded: Project) -> None:
    for stage in STAGES:
        manifest = Manifest.read(recorded.stage_dir(stage, MODEL))
        assert dvc.recorded_hash(recorded, stage, MODEL) == manifest.hash
    assert changed(recorded) == set()
    assert dvc.is_recorded(recorded, "package", MODEL)


def test_recording_adds_nothing_to_the_tree_but_dvc_lock(recorded: Project) -> None:
    assert run(recorded.root, "git", "status", "--porcelain").split() == ["??", "dvc.lock"]


def test_dvc_repro_has_nothing_to_do_after_recording(recorded: Project) -> None:
    before = (recorded.root / "dvc.lock").read_bytes()
    assert "up to date" in run(recorded.root, "dvc", "repro", *TARGETS)
    assert (recorded.root / "dvc.lock").read_bytes() == before


def test_an_edit_to_serving_stales_no_training_stage(recorded: Project) -> None:
    edit(recorded.root / "refrag_platform" / "serving" / "__init__.py", '"""', '""" ')
    assert changed(recorded) == {"package"}


def test_an_edit_to_the_model_stales_all_that_use_it(recorded: Project) -> None:
    edit(recorded.root / "refrag_platform" / "model" / "__init__.py", '"""', '""" ')
    assert changed(recorded) == set(STAGES) - {"corpus"}


def test_cpts_learning_rate_leaves_reconstruction_cached(recorded: Project) -> None:
    override(recorded, "cpt", {"decoder_learning_rate": 0.25})
    assert changed(recorded) == {RECIPE, "cpt"}
    assert dvc.is_recorded(recorded, "reconstruction", MODEL)
    assert runner.run_stage(recorded, "reconstruction", MODEL).cached
    assert not runner.run_stage(recorded, "cpt", MODEL).cached


def test_the_recipes_own_settings_are_watched_as_the_overrides_are(recorded: Project) -> None:
    edit(recorded.recipe_path(MODEL), "chunks: {batch_size: 512", "chunks: {batch_size: 64")
    assert RECIPE in run(recorded.root, "dvc", "status", *TARGETS)
    assert changed(recorded) == {RECIPE, "chunks"}


@pytest.mark.slow
def test_dvc_watches_what_a_recipe_extends_and_repro_makes_what_changed(recorded: Project) -> None:
    """The base of tiny, its old recipe, is another recipe now: all settings are the same, so nothing is stale."""
    path = recorded.recipe_path(MODEL)
    base = path.parent.parent / "base" / path.name
    base.parent.mkdir()
    base.write_text(path.read_text().replace("name: tiny", "name: base"))
    path.write_text("name: tiny\nextends: base\ndecoder: {tokenizer: path:tokenizer.json}\n")
    with pytest.raises(RefragError, match=r"dvc.yaml does not name models/base/recipe.yaml.*`refrag pipeline`"):
        write_resolved(recorded, MODEL)
    write_pipeline(recorded)
    assert changed(recorded) == {RECIPE}
    assert runner.run_stage(recorded, "corpus", MODEL).cached
    dvc.record(recorded, "corpus", MODEL)
    assert changed(recorded) == set()
    edit(base, "chunks: {batch_size: 512", "chunks: {batch_size: 64")
    assert RECIPE in run(recorded.root, "dvc", "status", *TARGETS)
    run(recorded.root, "dvc", "repro", dvc.target(RECIPE, MODEL))
    assert changed(recorded) == {"chunks"}
    assert not runner.run_stage(recorded, "chunks", MODEL).cached


@pytest.mark.parametrize("part", ["source", "content", "manifest", "lock"])
def test_a_stage_is_not_current_once_a_part_of_it_changed(recorded: Project, part: str) -> None:
    if part == "source":
        (recorded.source_dir(MODEL) / "notes.txt").write_text("The river rises in the south.")
    elif part == "content":
        (recorded.content("corpus", MODEL) / "train.json").write_text("?")
    elif part == "manifest":
        (recorded.stage_dir("corpus", MODEL) / FILE_NAME).unlink()
    else:
        (recorded.root / "dvc.lock").unlink()
    assert not dvc.is_recorded(recorded, "corpus", MODEL)


def test_what_was_not_made_from_todays_settings_is_not_recorded_as_if_it_were(
    repository: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    runner.run_stage(repository, "corpus", MODEL)
    override(repository, "corpus", {"passage_tokens": 32})
    with pytest.raises(ArtifactError, match="settings or code of corpus changed"):
        dvc.record(repository, "corpus", MODEL)
    assert dvc.recorded_hash(repository, "corpus", MODEL) is None


def test_recording_waits_for_another_writer(repository: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    made = runner.run_stage(repository, "corpus", MODEL)
    command = [sys.executable, "-c", HOLD_THE_LOCK]
    with subprocess.Popen(command, cwd=repository.root, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "held\n"
        assert dvc.record(repository, "corpus", MODEL) == made.manifest.hash


def test_four_writers_at_once_lose_nothing(repository: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    made = {
        (stage, model): runner.run_stage(repository, stage, model).manifest.hash
        for model in repository.models()
        for stage in ("corpus", "reconstruction")
    }
    assert len(set(made.values())) == 4
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [
        subprocess.Popen([sys.executable, "-c", RECORD, str(repository.root), *of], cwd=repository.root, **pipes)
        for of in made
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait() for writer in writers] == [0] * 4
    assert {of: dvc.recorded_hash(repository, *of) for of in made} == made
    targets = [dvc.target(*of) for of in made]
    assert json.loads(run(repository.root, "dvc", "status", "--json", *targets)) == {}


def test_a_dvc_lock_whose_writer_was_killed_is_the_one_before(
    recorded: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (recorded.root / "dvc.lock").read_bytes()
    (recorded.source_dir(MODEL) / "notes.txt").write_text("The river rises in the south.")
    made = runner.run_stage(recorded, "corpus", MODEL)
    child = os.fork()
    if child == 0:

        def dies_half_way(*arguments: object, **options: object) -> None:
            (recorded.root / "dvc.lock").write_bytes(whole[: len(whole) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(dvc, "ensure_repo", lambda project: None)
        monkeypatch.setattr(subprocess, "run", dies_half_way)
        dvc.record(recorded, "corpus", MODEL)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert (recorded.root / "dvc.lock").read_bytes() != whole
    assert not dvc.is_recorded(recorded, "corpus", MODEL)
    assert (recorded.root / "dvc.lock").read_bytes() == whole
    assert dvc.record(recorded, "corpus", MODEL) == made.manifest.hash
    assert dvc.is_recorded(recorded, "corpus", MODEL)


def test_a_dvc_lock_that_cannot_be_read_is_named_with_the_way_to_mend_it(recorded: Project) -> None:
    (recorded.root / "dvc.lock").write_text("schema: '2.0\nstages:")
    with pytest.raises(RefragError, match=r"dvc.lock is damaged .*delete it"):
        dvc.is_recorded(recorded, "corpus", MODEL)


def test_two_models_keep_their_versions_side_by_side(repository: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    hashes = {}
    for model in repository.models():
        hashes[model] = runner.run_stage(repository, "corpus", model).manifest.hash
        dvc.record(repository, "corpus", model)
    assert {model: dvc.recorded_hash(repository, "corpus", model) for model in hashes} == hashes
    assert len(set(hashes.values())) == len(hashes)


def test_checkout_restores_damaged_bytes(recorded: Project) -> None:
    damaged = recorded.content("cpt", MODEL) / "train.json"
    damaged.write_text("?")
    assert published(recorded, "cpt", MODEL) is None
    run(recorded.root, "dvc", "checkout", "--force", dvc.target("cpt", MODEL))
    assert published(recorded, "cpt", MODEL) is not None


def test_dvc_shows_the_metrics_and_curves_of_every_stage(recorded: Project) -> None:
    metrics = json.loads(run(recorded.root, "dvc", "metrics", "show", "--json"))[""]["data"]
    assert metrics[f"reports/metrics/{MODEL}/cpt.json"]["data"]["loss"] == 1.5
    assert len(metrics) == len(STAGES)
    plots = json.loads(run(recorded.root, "dvc", "plots", "show", "--json"))["data"]
    assert f"reports/curves/{MODEL}/cpt.csv" in plots
    assert f"reports/learning_rates/{MODEL}/cpt.decoder.csv" in plots


def test_making_everything_again_gives_the_same_hashes(recorded: Project) -> None:
    before = make_all(recorded)
    again = {stage: runner.run_stage(recorded, stage, MODEL, force=True).manifest.hash for stage in STAGES}
    assert again == before
    assert changed(recorded) == set()


def test_a_project_outside_git_is_refused_with_the_way_to_mend_it(project: Project) -> None:
    with pytest.raises(RefragError, match="Git repository"):
        dvc.is_recorded(project, "corpus", MODEL)


def test_a_remote_inside_the_project_is_refused(repository: Project) -> None:
    with pytest.raises(RefragError, match="outside"):
        dvc.set_remote(repository, str(repository.root / "remote"))


def test_dvc_reports_nothing_home(repository: Project) -> None:
    assert run(repository.root, "dvc", "config", "core.analytics").strip() == "false"
