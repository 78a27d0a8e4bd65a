"""`refrag run --seconds`: a run of limited time ends by itself, says so by its status, and goes on when run again."""

import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refrag_platform import runner
from refrag_platform.cli import PAUSED, app
from refrag_platform.errors import Paused
from refrag_platform.model.refrag import RefragModel
from refrag_platform.processes import stopped_after
from refrag_platform.project import Project
from refrag_platform.training.core import checkpoint
from refrag_platform.training.core.loop import TrainingInterrupted, train
from refrag_platform.training.cpt import cpt_task
from tests.conftest import ROOT
from tests.planted import MODEL, planted
from tests.training.conftest import repeating_documents, write_corpus


def test_what_waits_is_left_when_the_time_is_over() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)]
    with pytest.raises(Paused, match=r"after the 0\.1 s it was given; run it again"), stopped_after(0.1):
        while True:
            signal.pause()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)] == handlers


def test_without_a_limit_or_within_it_nothing_is_stopped() -> None:
    for seconds in (None, 1000):
        with stopped_after(seconds):
            pass


def test_a_training_saves_at_the_end_of_its_step(tmp_path: Path) -> None:
    recipe = Project(ROOT).recipe("tiny")
    corpus = write_corpus(tmp_path / "corpus", repeating_documents(16, 4, 200, range(100, 132)))
    lengths = {"context_tokens": 16, "output_tokens": 8, "curriculum": None}
    endless = recipe.cpt.model_copy(update={"steps": 10**6, "save_every": 10**6, **lengths})
    model = RefragModel.create(recipe, ROOT / "models" / "tiny")

    def time_is_over(step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGALRM)

    with pytest.raises(TrainingInterrupted, match="saved, run it again"), stopped_after(1000):
        train(cpt_task(model, corpus, endless, 0), endless, tmp_path / "work", "endless", on_step=time_is_over)
    (saved,) = checkpoint.complete(tmp_path / "work" / "checkpoints")
    assert saved.name == "step-00000003"


def test_the_status_tells_paused_from_done_and_from_refused(
    planted_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFRAG_ROOT", str(planted_project.root))

    def run(*arguments: str) -> int:
        return CliRunner().invoke(app, ["run", *arguments, "--model", MODEL]).exit_code

    with monkeypatch.context() as endless:
        endless.setattr(runner, "stage_function", lambda stage: lambda context: signal.pause())
        assert run("corpus", "reconstruction", "--seconds", "1") == PAUSED == 3
    assert not planted_project.stage_dir("corpus", MODEL).exists()
    monkeypatch.setattr(runner, "stage_function", lambda stage: planted)
    assert run("corpus", "reconstruction", "--seconds", "1000") == 0
    assert planted_project.content("reconstruction", MODEL).is_dir()
    assert run("nonsense") == 2
