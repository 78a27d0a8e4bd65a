"""The runner: an artifact is whole or not there, made once, from what its manifest says."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refrag_platform import runner
from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import FILE_NAME, Manifest, published
from refrag_platform.artifacts.publication import recover
from refrag_platform.errors import ArtifactError, CheckFailed, RefragError
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe, TrainsEncoder
from refrag_platform.runner import run_stage
from refrag_platform.stages import STAGES, StageContext, settings_of
from tests.planted import MODEL, override, plant
from tests.planted import planted as plants

HOLD_THE_LOCK = """
import sys, time
from pathlib import Path
from refrag_platform.artifacts.publication import only_runner
with only_runner(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
# What a publication does to the disk, the deletion of each file included; a kill may come before or after each.
OPERATIONS = ("rename", "replace", "unlink", "rmdir", "mkdir")
# What the stage below keeps to continue from.
STATE = {"a", "b", "c"}


@pytest.fixture
def planted(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose stages write a few bytes at once."""
    plant(monkeypatch)
    return project


def change_source(project: Project, text: str) -> None:
    (project.source_dir(MODEL) / "notes.txt").write_text(text)


def die_at(step: int) -> None:
    """Make this process kill itself before the step-th operation of OPERATIONS, or after it for odd steps."""
    count = 0

    def mortal(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            for phase in ("before", "after"):
                result = operation(*arguments, **options) if phase == "after" else None
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
            return result

        return call

    for name in OPERATIONS:
        setattr(os, name, mortal(getattr(os, name)))


def run_and_die(project: Project, step: int) -> bool:
    """Run the corpus stage in a child that dies at `step`; whether it lived to the end."""
    child = os.fork()
    if child == 0:
        die_at(step)
        run_stage(project, "corpus", MODEL)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return not os.WIFSIGNALED(status)


def makes_state(context: StageContext) -> dict[str, Any]:
    """A planted stage that keeps three files to continue from, and trusts them all once it finds one."""
    found = {path.name for path in context.work.iterdir()}
    assert found in (set(), STATE), "half a state was kept"
    for name in STATE - found:
        (context.work / name).write_text(name)
    return plants(context)


@pytest.mark.parametrize(
    "had_one", [pytest.param(False, id="first artifact"), pytest.param(True, id="replaces one", marks=pytest.mark.slow)]
)
def test_a_kill_at_any_point_of_publication_leaves_a_whole_artifact_or_none(
    planted: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, had_one: bool
) -> None:
    monkeypatch.setattr(runner, "stage_function", lambda stage: makes_state)
    # Looked up by each of some hundred runs, and always the same.
    recipe = planted.recipe(MODEL)
    monkeypatch.setattr(Project, "recipe", lambda project, model: recipe)
    for facts in ("hardware", "libraries"):
        monkeypatch.setattr(runner.manifests, facts, dict)
    folder, work = planted.stage_dir("corpus", MODEL), planted.work_dir("corpus", MODEL)
    old, before = None, {folder: tmp_path / "folder", work: tmp_path / "work"}
    if had_one:
        change_source(planted, "old")
        old = run_stage(planted, "corpus", MODEL).manifest.hash
        # As a run that was killed later left it: to be deleted by the next, whose settings are others.
        (work / "state").mkdir()
        for name in STATE:
            (work / "state" / name).write_text(name)
        for place, kept in before.items():
            shutil.copytree(place, kept)
    outcomes = set()
    for step in range(200):
        for place, kept in before.items():
            shutil.rmtree(place, ignore_errors=True)
            if had_one:
                shutil.copytree(kept, place)
        change_source(planted, "new")
        finished = run_and_die(planted, step)
        # Wherever an artifact has a place of its own, it is whole: no reader need look at its hash.
        for place in (folder, work / "ready", work / "old"):
            if place.exists():
                assert folder_digest(place / "content") == Manifest.read(place).hash, f"step {step}: half of {place}"
        recover(folder, work)
        manifest = published(planted, "corpus", MODEL)
        if manifest is None:
            assert not had_one and not folder.exists(), f"step {step} left something that is not whole"
        outcomes.add(manifest.hash if manifest else None)
        if had_one and step % 2:
            change_source(planted, "old")  # back to settings whose state may be half deleted
            run_stage(planted, "corpus", MODEL, force=True)
            change_source(planted, "new")
        new = run_stage(planted, "corpus", MODEL).manifest.hash
        assert outcomes <= {old, new}
        assert {path.name for path in work.iterdir()} == {".lock", "fingerprint"}
        if finished:
            break
    assert finished and step > 20, "the runner renames, deletes and makes several files and folders"
    assert outcomes == {old, new}, "some kills came before the new artifact was in place, some after"


def test_an_unchanged_stage_is_cached_and_force_makes_it_again(planted: Project) -> None:
    first = run_stage(planted, "corpus", MODEL)
    second = run_stage(planted, "corpus", MODEL)
    assert (first.cached, second.cached) == (False, True)
    assert second.manifest == first.manifest
    assert not run_stage(planted, "corpus", MODEL, force=True).cached


@pytest.mark.parametrize("change", ["settings", "code", "source", "bytes"])
def test_a_change_of_what_it_is_made_from_makes_it_again(planted: Project, change: str) -> None:
    run_stage(planted, "corpus", MODEL)
    if change == "settings":
        override(planted, "corpus", {"passage_tokens": 32})
    elif change == "code":
        with (planted.root / "refrag_platform" / "corpus" / "build.py").open("a") as module:
            module.write("# changed\n")
    elif change == "source":
        change_source(planted, "new")
    else:
        (planted.content("corpus", MODEL) / "train.json").write_text("?")
    assert not run_stage(planted, "corpus", MODEL).cached


@pytest.mark.parametrize("stage", ["cpt", "finetuned"])
def test_what_draws_the_encoder_s_rates_is_made_again_for_others(planted: Project, stage: str) -> None:
    recipe = planted.recipe(MODEL)
    other = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"rates": [1, 2]})})
    # Also where reconstruction, which comes before, is taken over and stays what it was.
    assert settings_of(STAGES[stage], recipe) != settings_of(STAGES[stage], other)


def test_the_manifest_says_what_the_artifact_was_made_from(planted: Project) -> None:
    corpus = run_stage(planted, "corpus", MODEL)
    result = run_stage(planted, "reconstruction", MODEL)
    manifest = Manifest.read(result.path)
    assert manifest == result.manifest
    assert manifest.inputs["corpus"].path == f"data/{MODEL}/corpus/content"
    assert manifest.inputs["corpus"].hash == corpus.manifest.hash
    assert set(manifest.settings) == set(STAGES["reconstruction"].sections)
    assert manifest.hash == folder_digest(result.path / "content")
    assert {"torch", "transformers"} <= set(manifest.libraries)


def test_a_missing_input_is_named_with_the_command_that_makes_it(planted: Project) -> None:
    with pytest.raises(ArtifactError, match="refrag run corpus --model tiny"):
        run_stage(planted, "reconstruction", MODEL)


def test_a_damaged_input_is_refused(planted: Project) -> None:
    run_stage(planted, "corpus", MODEL)
    shard = planted.content("corpus", MODEL) / "train" / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"the files were changed"):
        run_stage(planted, "reconstruction", MODEL)
    assert not planted.stage_dir("reconstruction", MODEL).exists()


def test_an_input_that_is_replaced_meanwhile_stops_the_run(planted: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stage(planted, "corpus", MODEL)
    function = runner.stage_function(STAGES["corpus"])

    def meanwhile(context: StageContext) -> dict[str, Any]:
        metrics = function(context)
        monkeypatch.setattr(runner, "stage_function", lambda stage: function)
        change_source(planted, "new")
        run_stage(planted, "corpus", MODEL)
        return metrics

    monkeypatch.setattr(runner, "stage_function", lambda stage: meanwhile)
    with pytest.raises(ArtifactError, match="replaced while it ran"):
        run_stage(planted, "reconstruction", MODEL)
    assert not planted.stage_dir("reconstruction", MODEL).exists()
    assert not run_stage(planted, "reconstruction", MODEL).cached


def test_a_second_runner_is_refused_until_the_first_is_gone(planted: Project) -> None:
    work = planted.work_dir("corpus", MODEL)
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(work)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(RefragError, match="another process is running this stage"):
            run_stage(planted, "corpus", MODEL)
        first.kill()
    assert not run_stage(planted, "corpus", MODEL).cached


def test_a_failing_stage_leaves_the_last_good_version_and_its_own_state(
    planted: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = run_stage(planted, "corpus", MODEL).manifest
    change_source(planted, "new")

    def fails(context: StageContext) -> dict[str, Any]:
        (context.out / "half.bin").write_text("half")
        (context.work / "progress").write_text("half way")
        raise ValueError("out of disk")

    seen = []

    def continues(context: StageContext) -> dict[str, Any]:
        seen.extend(path.name for path in (*context.out.iterdir(), *context.work.iterdir()))
        return {}

    monkeypatch.setattr(runner, "stage_function", lambda stage: fails)
    with pytest.raises(ValueError, match="out of disk"):
        run_stage(planted, "corpus", MODEL)
    assert published(planted, "corpus", MODEL) == good
    monkeypatch.setattr(runner, "stage_function", lambda stage: continues)
    run_stage(planted, "corpus", MODEL)
    assert seen == ["progress"], "state is continued from, half an artifact is not"


def test_state_of_other_settings_is_not_continued_from(planted: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(context: StageContext) -> dict[str, Any]:
        assert list(context.work.iterdir()) == []
        (context.work / "progress").write_text("half way")
        raise ValueError

    monkeypatch.setattr(runner, "stage_function", lambda stage: fails)
    for text in ("old", "new"):
        change_source(planted, text)
        with pytest.raises(ValueError):
            run_stage(planted, "corpus", MODEL)


def test_a_failing_blocking_check_keeps_the_last_good_version(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as unchecked:
        plant(unchecked)
        good = run_stage(project, "corpus", MODEL).manifest
        function = runner.stage_function(STAGES["corpus"])
    change_source(project, "new")
    # The real suite refuses planted bytes: they are no corpus.
    monkeypatch.setattr(runner, "stage_function", lambda stage: function)
    with pytest.raises(CheckFailed, match="is not published"):
        run_stage(project, "corpus", MODEL)
    assert published(project, "corpus", MODEL) == good
    assert (project.work_dir("corpus", MODEL) / "failed" / "content" / "train.json").is_file()
    assert not (project.work_dir("corpus", MODEL) / "failed" / FILE_NAME).exists()


def test_an_unknown_stage_is_refused_with_the_names_there_are(project: Project) -> None:
    with pytest.raises(RefragError, match=r"no stage 'pretraining'; the stages are: corpus, reconstruction"):
        run_stage(project, "pretraining", MODEL)


def inputs_behind(stage: str) -> set[str]:
    """All that a stage is made from, directly or not."""
    return {name for put in STAGES[stage].inputs for name in (put, *inputs_behind(put))}


def test_what_reads_the_encoder_s_vectors_comes_after_all_that_trains_it() -> None:
    sections = {name: Recipe.model_fields[name].annotation for name in STAGES if name in Recipe.model_fields}
    training = {name for name, section in sections.items() if section and issubclass(section, TrainsEncoder)}
    assert {"cpt", "finetuned"} <= training
    readers = set(STAGES) - training - {"corpus"}
    assert {"chunks", "policy"} <= readers
    assert all(training <= inputs_behind(stage) for stage in readers)


def test_the_registry_lists_inputs_before_what_is_made_from_them() -> None:
    names = list(STAGES)
    assert all(names.index(put) < names.index(stage.name) for stage in STAGES.values() for put in stage.inputs)


def test_an_artifacts_hash_stands_for_its_chain_even_where_the_same_bytes_come_out(
    planted: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def constant(context: StageContext) -> dict[str, Any]:
        (context.out / "model.bin").write_text("the same")
        return {}

    hashes = []
    for text in ("old", "new"):
        change_source(planted, text)
        with monkeypatch.context() as unchanged:
            plant(unchanged)
            run_stage(planted, "corpus", MODEL)
        monkeypatch.setattr(runner, "stage_function", lambda stage: constant)
        hashes.append([run_stage(planted, name, MODEL).manifest.hash for name in ("reconstruction", "cpt")])
    assert not set(hashes[0]) & set(hashes[1])
