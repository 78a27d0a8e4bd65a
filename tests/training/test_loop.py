"""The loop: the same curve whatever interrupts it, and a clear end when a run can't become useful."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from refrag_platform.errors import RefragError
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import CptRecipe, Recipe
from refrag_platform.training.core import checkpoint, metrics
from refrag_platform.training.core.loop import (
    TrainingDiverged,
    TrainingInterrupted,
    learning_rate_factor,
    train,
)
from refrag_platform.training.core.windows import WindowSampler
from refrag_platform.training.cpt import CptTask, cpt_task
from tests.conftest import ROOT
from tests.training.conftest import repeating_documents, write_corpus

STEPS = 12


def settings(recipe: Recipe, **changes: Any) -> CptRecipe:
    base = {"steps": STEPS, "batch_size": 4, "context_tokens": 16, "output_tokens": 8, "log_every": 3, "save_every": 4}
    return recipe.cpt.model_copy(update={**base, "curriculum": None, **changes})


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", repeating_documents(16, 4, 200, range(100, 132)))


def curve(work: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics.read(work / "metrics.jsonl")]


def fresh(recipe: Recipe) -> RefragModel:
    return RefragModel.create(recipe, ROOT / "models" / "tiny")


def test_runs_that_continue_each_other_give_the_curve_of_one_long_run(
    recipe: Recipe, corpus: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = settings(recipe)
    one = train(cpt_task(fresh(recipe), corpus, wanted, 0), wanted, whole, "one run")
    for _ in range(2):
        with pytest.raises(TrainingInterrupted, match="saved"):
            train(cpt_task(fresh(recipe), corpus, wanted, 0), wanted, parts, "part", stop_after=5)
    last = train(cpt_task(fresh(recipe), corpus, wanted, 0), wanted, parts, "part")
    assert curve(parts) == curve(whole)
    for figure in ("first_loss", "last_loss", "loss_before", "loss_after"):
        assert last[figure] == one[figure]


def test_the_loss_before_and_after_is_of_the_same_batches(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    """What is learnt lowers it, and where nothing is learnt it stays, whatever batches the log began and ended with."""
    wanted = settings(recipe)
    taught = train(cpt_task(fresh(recipe), corpus, wanted, 0), wanted, tmp_path / "taught", "taught")
    assert taught["loss_after"] < taught["loss_before"]
    # Rates of nothing but 0 are refused; these are far below what a weight can hold.
    idle = settings(recipe, encoder_learning_rate=1e-30, projection_learning_rate=1e-30, decoder_learning_rate=1e-30)
    stayed = train(cpt_task(fresh(recipe), corpus, idle, 0), idle, tmp_path / "idle", "idle")
    assert stayed["loss_after"] == stayed["loss_before"] == taught["loss_before"]
    assert stayed["first_loss"] != stayed["last_loss"]


def test_a_half_written_checkpoint_is_not_resumed_from(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    work, wanted = tmp_path / "work", settings(recipe)
    with pytest.raises(TrainingInterrupted):
        train(cpt_task(fresh(recipe), corpus, wanted, 0), wanted, work, "part", stop_after=5)
    half = work / "checkpoints" / "step-00000011"
    half.mkdir()
    (work / "checkpoints" / "step-00000010.partial").mkdir()
    (work / "checkpoints" / "step-00000010.partial" / checkpoint.COMPLETE).write_text("{}")
    assert [folder.name for folder in checkpoint.complete(work / "checkpoints")][-1] == "step-00000005"
    assert train(cpt_task(fresh(recipe), corpus, wanted, 0), wanted, work, "rest")["steps"] == STEPS


def test_metrics_written_after_the_checkpoint_are_not_written_twice(
    recipe: Recipe, corpus: Path, tmp_path: Path
) -> None:
    work, wanted = tmp_path / "work", settings(recipe)
    with pytest.raises(TrainingInterrupted):
        train(cpt_task(fresh(recipe), corpus, wanted, 0), wanted, work, "part", stop_after=4)
    with (work / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 6, "loss": 99.0}) + '\n{"step": 7, "lo')
    train(cpt_task(fresh(recipe), corpus, wanted, 0), wanted, work, "rest")
    steps = [step for step, _ in curve(work)]
    assert steps == sorted(set(steps)) and 99.0 not in dict(curve(work)).values()


def test_accumulating_micro_batches_is_one_large_batch(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    class SameWindows(CptTask):
        def batch(self, step: int, micro: int, size: int, rank: int, world: int) -> dict[str, Any]:
            whole = super().batch(step, 0, 4, rank, world)
            rows = slice(micro * size, (micro + 1) * size)
            context = whole["context"][rows]
            index = torch.arange(context.shape[0] * context.shape[1]).view(context.shape[0], -1)
            index = nn.functional.pad(index, (1, 0), value=-1)  # the token that starts a text
            return {**{name: value[rows] for name, value in whole.items()}, "chunk_index": index}

    losses = []
    for micro in (4, 2):
        wanted = settings(recipe, micro_batch_size=micro, mixed_steps_share=0.0, log_every=1, steps=4)
        windows = {4: WindowSampler(corpus, "train", 24, 0)}
        work = tmp_path / str(micro)
        train(SameWindows(fresh(recipe), wanted, windows, 0), wanted, work, "run")
        losses.append([loss for _, loss in curve(work)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_collapsed_encoder_stops_the_run_with_the_fix(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    model, wanted = fresh(recipe), settings(recipe)
    with torch.no_grad():
        model.encoder.skip.weight.zero_()
    with pytest.raises(TrainingDiverged, match=r"collapsed at step 1.*encoder_learning_rate"):
        train(cpt_task(model, corpus, wanted, 0), wanted, tmp_path / "work", "collapsing")


def test_a_loss_that_is_not_finite_stops_the_run(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    model, wanted = fresh(recipe), settings(recipe)
    with torch.no_grad():
        model.decoder.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="loss is nan"):
        train(cpt_task(model, corpus, wanted, 0), wanted, tmp_path / "work", "diverging")


def test_every_group_of_parameters_has_its_learning_rate_in_the_metrics(
    recipe: Recipe, corpus: Path, tmp_path: Path
) -> None:
    rates = {"encoder_learning_rate": 1e-3, "projection_learning_rate": 0.0, "decoder_learning_rate": 4e-3}
    wanted = settings(recipe, steps=4, log_every=1, warmup_share=0.5, final_learning_rate_share=1.0, **rates)
    summary = train(cpt_task(fresh(recipe), corpus, wanted, 0), wanted, tmp_path / "work", "run")
    lines = metrics.read(tmp_path / "work" / "metrics.jsonl")
    assert [line["learning_rate_decoder"] for line in lines] == pytest.approx([2e-3, 4e-3, 4e-3, 4e-3])
    assert [line["learning_rate_encoder"] for line in lines] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    assert {line["learning_rate_projection"] for line in lines} == {0.0}
    # What is read without a group's name is the rate of whatever learns fastest.
    assert all(line["learning_rate"] == line["learning_rate_decoder"] for line in lines)
    assert summary["last"]["learning_rate_decoder"] == pytest.approx(4e-3)


def test_rates_of_zero_everywhere_are_refused(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    names = ("encoder_learning_rate", "projection_learning_rate", "decoder_learning_rate")
    wanted = settings(recipe, **dict.fromkeys(names, 0.0))
    with pytest.raises(RefragError, match="the learning rates of encoder, projection, decoder are 0"):
        train(cpt_task(fresh(recipe), corpus, wanted, 0), wanted, tmp_path / "work", "run")


def test_a_corpus_of_short_documents_is_refused_by_length(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "short", repeating_documents(4, 2, 3, range(100, 132)))
    with pytest.raises(RefragError, match=r"no document of 24 tokens .the longest has 8"):
        WindowSampler(corpus, "train", 24, 0)


def test_windows_repeat_with_the_seed_and_the_ranks_share_them_out(corpus: Path) -> None:
    windows = WindowSampler(corpus, "train", 24, 0)
    whole = windows.batch(3, 0, 8)
    assert torch.equal(torch.cat([windows.batch(3, 0, 8, rank, 2) for rank in (0, 1)]), whole)
    assert torch.equal(windows.batch(3, 0, 8), whole)
    assert not torch.equal(windows.batch(4, 0, 8), whole)
    assert all(torch.equal(row[:8], row[16:24]) for row in whole)  # within one document


def test_the_schedule_warms_up_and_falls_to_its_floor(recipe: Recipe) -> None:
    wanted = settings(recipe, steps=100, warmup_share=0.1, final_learning_rate_share=0.1)
    factors = [learning_rate_factor(step, wanted) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert factors[9:] == sorted(factors[9:], reverse=True) and factors[-1] == pytest.approx(0.1, abs=0.01)


SCRIPT = """
import sys
from pathlib import Path
from refrag_platform.project import Project
from refrag_platform.model.refrag import RefragModel
from refrag_platform.training.core.loop import TrainingInterrupted, train
from refrag_platform.training.cpt import cpt_task
root, corpus, work = map(Path, sys.argv[1:4])
recipe = Project(root).recipe("tiny")
wanted = recipe.cpt.model_copy(update=dict(steps=100000, batch_size=4, context_tokens=16, output_tokens=8,
    curriculum=None, log_every=1, save_every=100000))
model = RefragModel.create(recipe, root / "models" / "tiny")
try:
    train(cpt_task(model, corpus, wanted, 0), wanted, work, "signalled", on_step=lambda step: print(step, flush=True))
except TrainingInterrupted as stop:
    print("saved:", stop)
    sys.exit(7)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_the_step_and_stops(number: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(ROOT), str(corpus), str(work)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "3":
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait() == 7 and "saved, run it again" in rest
    saved = checkpoint.complete(work / "checkpoints")
    assert len(saved) == 1
    assert json.loads((saved[0] / checkpoint.COMPLETE).read_text())["step"] >= 3


def test_a_signal_to_the_group_saves_a_training_with_workers(tmp_path: Path) -> None:
    """A cancelled run sends SIGTERM to all processes of the group: workers leave the stop to the training."""
    program = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from refrag_platform.training.core.prefetch import made_by_workers
from refrag_platform.training.core.loop import _stop_on_signal
def make(step):
    time.sleep(0.2)
    return step
with _stop_on_signal() as stopped:
    for step in made_by_workers(make, range(1000), 1):
        print(step, flush=True)
        if stopped["signal"]:
            print("saved", flush=True)
            break
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        os.killpg(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert said.endswith("saved\n") and process.returncode == 0
