"""What was made elsewhere is current here, or it is refused by the name of what differs and nothing lands."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refrag_platform import runner
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.bundle import landing
from refrag_platform.bundle.landing import import_results
from refrag_platform.bundle.pieces import MIB
from refrag_platform.bundle.results import export_results
from refrag_platform.errors import ArtifactError, CheckFailed, Paused, RefragError
from refrag_platform.history.status import status
from refrag_platform.project import Project
from refrag_platform.quality.results import DOCS_FOLDER
from refrag_platform.stages import StageContext
from refrag_platform.training.core import checkpoint
from refrag_platform.training.core.checkpoint import COMPLETE
from tests.bundle.conftest import SendOut
from tests.planted import MODEL, planted

MADE = ("reconstruction", "cpt")


def make(project: Project, *stages: str) -> None:
    for stage in stages:
        runner.run_stage(project, stage, MODEL)


def results(there: Project, out: Path) -> Path:
    export_results(there, out, 16, None, None)
    return out


def states(project: Project) -> dict[str, str]:
    return {row.stage: row.state for row in status(project, MODEL)}


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_what_lands_is_what_a_run_here_would_have_made(home: Project, send_out: SendOut, tmp_path: Path) -> None:
    there = send_out()
    make(there, *MADE)
    (landed,) = import_results(home, [results(there, tmp_path / "out")])
    assert list(landed.artifacts) == list(MADE) and landed.unfinished == []
    assert {states(home)[stage] for stage in ("corpus", *MADE)} == {"current"}
    for stage in MADE:
        assert runner.run_stage(home, stage, MODEL).cached
        here, made = (Manifest.read(project.stage_dir(stage, MODEL)) for project in (home, there))
        assert here == made
        logs = {(project.stage_dir(stage, MODEL) / "metrics.jsonl").read_bytes() for project in (home, there)}
        assert len(logs) == 1
        assert (home.root / "reports" / "metrics" / MODEL / f"{stage}.json").is_file()
        assert runner.run_stage(home, stage, MODEL, force=True).manifest.hash == made.hash


def test_a_model_and_its_controls_share_a_bundle_and_land_together(
    home: Project, send_out: SendOut, tmp_path: Path
) -> None:
    recipe = home.recipe_path(MODEL)
    recipe.write_text(f"{recipe.read_text()}controls: {{full: {{}}, none: {{}}}}\n")
    controls = [f"{MODEL}--full", f"{MODEL}--none"]
    there = send_out(models=[MODEL, *controls])
    assert [folder.name for folder in (there.root / "data").iterdir()] == [MODEL]
    make(there, *MADE)
    runner.run_stage(there, "cpt", controls[0])
    landed = {each.model: list(each.artifacts) for each in import_results(home, [results(there, tmp_path / "out")])}
    assert landed == {MODEL: list(MADE), controls[0]: ["cpt"], controls[1]: []}
    for model, stages in landed.items():
        for stage in stages:
            assert runner.run_stage(home, stage, model).cached
    again = send_out("again", [MODEL, *controls])
    index = json.loads((again.root / "bundle.json").read_text())
    assert index["models"] == {controls[1]: ["cpt"]}, "nothing is to be done for the others"


def test_a_recipe_that_extends_another_and_what_a_run_set_count_there_as_here(
    home: Project, send_out: SendOut, tmp_path: Path
) -> None:
    home.run_overrides("other").parent.mkdir(parents=True)
    home.recipe_path("other").write_text(f"name: other\nextends: {MODEL}\n")
    home.run_overrides("other").write_text("cpt: {steps: 3}\n")
    runner.run_stage(home, "corpus", "other")
    there = send_out(models=["other"])
    assert there.recipe("other") == home.recipe("other") and there.recipe("other").cpt.steps == 3
    for stage in MADE:
        runner.run_stage(there, stage, "other")
    (landed,) = import_results(home, [results(there, tmp_path / "out")])
    assert list(landed.artifacts) == list(MADE)


def test_the_commit_is_that_of_the_checkout_that_sent_the_work(
    home: Project, send_out: SendOut, tmp_path: Path
) -> None:
    there = send_out()
    replace(there.root / "bundle.json", '"commit": ""', '"commit": "abc"')
    make(there, *MADE)
    import_results(home, [results(there, tmp_path / "out")])
    assert Manifest.read(home.stage_dir("cpt", MODEL)).commit == "abc"


def test_a_second_import_changes_nothing(home: Project, send_out: SendOut, tmp_path: Path) -> None:
    there = send_out()
    make(there, *MADE)
    out = results(there, tmp_path / "out")
    import_results(home, [out])
    before = home.stage_dir("cpt", MODEL).stat().st_ino
    assert list(import_results(home, [out])[0].artifacts) == list(MADE)
    assert home.stage_dir("cpt", MODEL).stat().st_ino == before


def source(project: Project) -> None:
    (project.source_dir(MODEL) / "more.txt").write_text("And ends in the south.")
    make(project, "corpus")


def setting(project: Project) -> None:
    replace(project.recipe_path(MODEL), "cpt: {steps: 40", "cpt: {steps: 41")


def seed(project: Project) -> None:
    replace(project.recipe_path(MODEL), "seed: 0", "seed: 1")


def code(project: Project) -> None:
    path = project.root / "refrag_platform" / "training" / "reconstruction.py"
    path.write_text(path.read_text() + "\n# changed\n")


def tokenizer(project: Project) -> None:
    path = project.recipe_path(MODEL).parent / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    ("change", "stage", "named"),
    [
        (source, "reconstruction", "input corpus: made from .*, here is "),
        (setting, "cpt", r"setting cpt\.steps: made with 40, here it is 41"),
        (seed, "reconstruction", "seed: made with 0, here it is 1"),
        (code, "reconstruction", "code: refrag_platform/training/reconstruction.py\n"),
        (tokenizer, "reconstruction", "file models/tiny/tokenizer.json: it has hash"),
    ],
)
def test_what_changed_here_is_named_and_nothing_lands(
    home: Project, send_out: SendOut, tmp_path: Path, change: Callable[[Project], None], stage: str, named: str
) -> None:
    there = send_out()
    make(there, *MADE)
    out = results(there, tmp_path / "out")
    change(home)
    before = states(home)
    with pytest.raises(ArtifactError, match=f"(?s){stage} of tiny was not made from what is here.*{named}"):
        import_results(home, [out])
    assert states(home) == before and before["reconstruction"] == "missing"
    assert not (home.root / "work" / ".bundle" / "unpacked").exists()


def test_code_that_was_changed_there_is_named(home: Project, send_out: SendOut, tmp_path: Path) -> None:
    there = send_out()
    code(there)
    make(there, *MADE)
    with pytest.raises(ArtifactError, match=r"code: refrag_platform/training/reconstruction\.py"):
        import_results(home, [results(there, tmp_path / "out")])


def test_another_result_of_the_same_run_is_not_overwritten(
    home: Project, send_out: SendOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = send_out()
    make(there, *MADE)

    def other(context: StageContext) -> dict[str, Any]:
        (context.out / "noise").write_text("of another device")
        return planted(context)

    monkeypatch.setattr(runner, "stage_function", lambda stage: other)
    make(home, "reconstruction")
    with pytest.raises(ArtifactError, match=r"is current with hash .*, the bundle's has .*; move the one here away"):
        import_results(home, [results(there, tmp_path / "out")])


def test_a_blocking_check_that_fails_lets_nothing_land(
    home: Project, send_out: SendOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = send_out()
    make(there, *MADE)

    # What a bundle says of its own checks counts for nothing.
    (there.stage_dir("cpt", MODEL) / DOCS_FOLDER).mkdir()

    def failing(recipe: Any, manifest: Manifest, folder: Path, inputs: dict[str, Path]) -> list[str]:
        assert not (folder / DOCS_FOLDER).exists()
        assert (folder / "content").is_dir() and all(path.is_dir() for path in inputs.values())
        return ["loss: too high"] if manifest.stage == "cpt" else []

    monkeypatch.setattr(landing, "blocking_failures", failing)
    with pytest.raises(CheckFailed, match=r"cpt of tiny fails 1 blocking check.*\n  loss: too high"):
        import_results(home, [results(there, tmp_path / "out")])
    assert states(home)["reconstruction"] == "missing"


def test_work_is_no_result_and_a_checkout_no_bundle(home: Project, send_out: SendOut, tmp_path: Path) -> None:
    there = send_out()
    with pytest.raises(RefragError, match="holds work to be done on another machine"):
        import_results(home, [tmp_path / "there.bundle"])
    with pytest.raises(RefragError, match=r"nothing was made in .* yet; run reconstruction, cpt of tiny first"):
        results(there, tmp_path / "out")
    with pytest.raises(RefragError, match=r"has no bundle\.json"):
        results(home, tmp_path / "out")


def stop_at(project: Project, stage: str, step: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run a stage that is stopped once it has saved at `step`; returns its newest checkpoint."""

    def run(context: StageContext) -> dict[str, Any]:
        folder = context.work / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / COMPLETE).write_text("{}")
        raise Paused("stopped")

    with monkeypatch.context() as stopped:
        stopped.setattr(runner, "stage_function", lambda stage: run)
        with pytest.raises(Paused):
            make(project, stage)
    return project.work_dir(stage, MODEL) / "state" / "checkpoints" / f"step-{step:08d}"


def checkpoints(project: Project) -> list[str]:
    folder = project.work_dir("reconstruction", MODEL) / "state" / "checkpoints"
    return sorted(path.name for path in folder.iterdir())


def test_an_interrupted_stage_goes_on_there_and_on_a_third_machine(
    home: Project, send_out: SendOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each finds the newest complete checkpoint, and no older or half-written one."""
    (stop_at(home, "reconstruction", 1, monkeypatch).parent / "step-00000002.partial").mkdir()
    there = send_out("there")
    assert checkpoints(there) == ["step-00000001"]
    stop_at(there, "reconstruction", 2, monkeypatch)
    (landed,) = import_results(home, [results(there, tmp_path / "out")])
    assert landed.artifacts == {} and landed.unfinished == ["reconstruction"]
    assert checkpoints(send_out("third")) == ["step-00000002"]
    # A run here has come further meanwhile.
    stop_at(home, "reconstruction", 3, monkeypatch)
    assert import_results(home, [tmp_path / "out"])[0].unfinished == []
    assert checkpoints(home)[-1] == "step-00000003"


def test_of_several_rates_the_newest_checkpoint_of_each_goes_on(tmp_path: Path) -> None:
    for name in ("rate-0.001/checkpoints/step-00000004", "rate-0.001/checkpoints/step-00000008.partial",
                 "rate-0.001/checkpoints/step-00000006", "rate-0.002/checkpoints/step-00000002"):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / COMPLETE).write_text("{}")
    assert [folder.name for folder in checkpoint.newest(tmp_path)] == ["step-00000006", "step-00000002"]
    assert checkpoint.steps_done(tmp_path) == 8


def test_the_state_of_another_run_is_refused(
    home: Project, send_out: SendOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = send_out()
    stop_at(there, "reconstruction", 1, monkeypatch)
    out = results(there, tmp_path / "out")
    seed(home)
    with pytest.raises(ArtifactError, match="unfinished reconstruction of tiny was begun with other inputs"):
        import_results(home, [out])


def test_state_that_does_not_fit_is_left_out_and_said(
    home: Project, send_out: SendOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = send_out()
    make(there, "reconstruction")
    (stop_at(there, "cpt", 1, monkeypatch) / "optimizer.bin").write_bytes(os.urandom(MIB))
    index, left_out = export_results(there, tmp_path / "out", 1, 2, None)
    assert index["models"] == {MODEL: ["reconstruction"]} and index["unfinished"] == {MODEL: []}
    assert left_out is not None and re.search(r"left out: the state of cpt of tiny, .* 2 pieces of 1 MiB", left_out)
    assert list(import_results(home, [tmp_path / "out"])[0].artifacts) == ["reconstruction"]
