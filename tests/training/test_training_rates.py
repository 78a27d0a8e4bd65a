"""Training at several compression rates: each step draws one, and reads at it what evaluation and serving read."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import PAD, Chunks, Text, chunk_tokens, lay_out
from refrag_platform.recipes import Recipe
from refrag_platform.training.core.loop import TrainingInterrupted, train
from refrag_platform.training.cpt import CptTask
from refrag_platform.training.examples import Examples
from refrag_platform.training.finetuned import FinetunedTask
from refrag_platform.training.kept import step_rate
from tests.encoders import ENCODERS, model_with
from tests.training.reading import batch_of, reading_task
from tests.training.test_examples import write_questions
from tests.training.test_finetuned import ROWS, ready, wanted

RATES = (1, 2, 4)
close = torch.testing.assert_close


@pytest.fixture(params=ENCODERS)
def any_model(request: pytest.FixtureRequest) -> RefragModel:
    model = model_with(request.param)
    model.rates = RATES
    return model


def steps_of(rates: tuple[int, ...]) -> list[int]:
    """For each of the rates a step after the first that draws it."""
    return [next(step for step in range(1, 60) if step_rate(RATES, 0, step) == rate) for rate in rates]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("rates") / "corpus")


def finetuned_task(model: RefragModel, recipe: Recipe, corpus: Path, **settings: object) -> FinetunedTask:
    settings = {"max_passages": 4, "precision": "fp32", "kept_prompts_share": 0.5, "tasks": {"rag": 1.0}} | settings
    chosen = recipe.finetuned.model_copy(update=settings)
    return FinetunedTask(model, chosen, Examples(corpus, chosen, seed=0))


@torch.no_grad()
def test_reading_encodes_each_passage_by_itself_and_pools_it(any_model: RefragModel, tmp_path: Path) -> None:
    model = any_model
    task, k = reading_task(model, tmp_path, kept_steps_share=0.5), model.chunk_size
    assert task.reading is not None
    ragged = False
    for rate, step in zip(RATES, steps_of(RATES), strict=True):
        batch = batch_of(task, step)
        assert batch["chunks"].shape[1:] == (256 // k // rate, k * rate)
        vectors = model.encode_rows(batch["chunks"], batch["windows"])
        for row in range(2):
            chance = np.random.default_rng([0, 5, step, 0, row])
            drawn = task.reading._draw(chance, rate).passages
            fine = [chunk_tokens(passage.token_ids, k) for passage in drawn]
            ragged |= any(len(ids) % rate for ids in fine)
            alone = [Chunks(ids, vectors=model.encode(ids)).at_rate(rate) for ids in fine]
            real = batch["chunks"][row, :, 0] != PAD
            assert torch.equal(batch["chunks"][row][real], torch.cat([part.token_ids for part in alone]))
            stored = torch.cat([part.vectors for part in alone if part.vectors is not None])
            close(vectors[row][real], stored, atol=1e-4, rtol=1e-4)
    assert ragged


@pytest.mark.parametrize("encoder_rate", [0.0, 0.1])
def test_fine_tuning_reads_at_each_rate_what_serving_reads(
    any_model: RefragModel, recipe: Recipe, corpus: Path, encoder_rate: float
) -> None:
    model = any_model
    task = finetuned_task(model, recipe, corpus, encoder_learning_rate=encoder_rate)
    for rate, step in zip(RATES, steps_of(RATES), strict=True):
        batch = ready(task, step)
        coarse = model.at_rate(rate)
        prompts = [[*prompt, Text(answer)] for prompt, answer in (wanted(task, step, row, rate) for row in range(ROWS))]
        layout = lay_out(prompts, coarse.chunk_size, "right")
        length = layout.token_ids.shape[1]
        assert torch.equal(batch["token_ids"][:, :length], layout.token_ids)
        with torch.no_grad():
            read = task._embeds(batch)[:, :length][layout.attention_mask]
            close(read, coarse.embed(prompts, "right").embeds[layout.attention_mask], atol=1e-4, rtol=1e-4)


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_first_rate_has_its_share_of_the_steps() -> None:
    drawn = [step_rate((1, 2, 4), 0, step, 0.7) for step in range(2000)]
    shares = [drawn.count(rate) / len(drawn) for rate in (1, 2, 4)]
    assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.03)
    assert {step_rate((1, 2), 0, step, 1.0) for step in range(50)} == {1}
    assert {step_rate((1,), 0, step, 0.0) for step in range(50)} == {1}


def test_reading_tasks_draw_rates_by_their_share(model: RefragModel, tmp_path: Path) -> None:
    model.rates = RATES
    for share, rates in ((None, set(RATES)), (1.0, {1}), (0.0, set(RATES) - {1})):
        reading = reading_task(model, tmp_path, first_rate_share=share).reading
        assert reading is not None
        assert {reading.rate_and_kept(step)[0] for step in range(40)} == rates


@pytest.mark.parametrize("stage", ["cpt", "finetuned"])
def test_a_resumed_training_draws_the_same_rates(
    recipe: Recipe, model: RefragModel, corpus: Path, tmp_path: Path, stage: str
) -> None:
    model.rates = RATES

    def task() -> CptTask | FinetunedTask:
        fresh = copy.deepcopy(model)
        return reading_task(fresh, tmp_path) if stage == "cpt" else finetuned_task(fresh, recipe, corpus)

    assert all(len({step_rate(RATES, 0, step) for step in part}) > 1 for part in (range(3), range(3, 6)))
    short = {"steps": 6, "batch_size": 2, "save_every": 3, "log_every": 1, "precision": "fp32"}
    settings = task().settings.model_copy(update=short)
    train(task(), settings, tmp_path / "whole", stage)
    with pytest.raises(TrainingInterrupted):
        train(task(), settings, tmp_path / "parts", stage, stop_after=3)
    train(task(), settings, tmp_path / "parts", stage)
    losses = [[line["loss"] for line in curve(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_a_model_learns_to_read_at_every_rate(recipe: Recipe, model: RefragModel, corpus: Path, tmp_path: Path) -> None:
    model.rates = (1, 2)
    learning = {"encoder_learning_rate": 3e-3, "projection_learning_rate": 3e-3, "decoder_learning_rate": 3e-3}
    task = finetuned_task(model, recipe, corpus, kept_prompts_share=0.0, **learning)
    settings = task.settings.model_copy(update={"steps": 40, "batch_size": 4, "log_every": 1, "save_every": 100})
    train(task, settings, tmp_path / "work", "finetuned")
    by_rate: dict[int, list[float]] = {1: [], 2: []}
    for line in curve(tmp_path / "work"):
        by_rate[step_rate(model.rates, 0, int(line["step"]) - 1)].append(line["loss"])
    for losses in by_rate.values():
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1.0
