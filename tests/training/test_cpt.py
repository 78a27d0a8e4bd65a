"""CPT's batches: which steps repeat their context, and how that is laid out."""

from pathlib import Path
from typing import Any

import torch

from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import CptRecipe
from refrag_platform.training.core.loop import train
from refrag_platform.training.cpt import CptTask, cpt_task
from tests.training.conftest import repeating_documents, write_corpus


def _task(model: RefragModel, folder: Path, **settings: Any) -> CptTask:
    corpus = write_corpus(folder / "corpus", repeating_documents(64, 4, 8, range(10, 200)))
    usual = {"steps": 8, "batch_size": 2, "precision": "fp32", "context_tokens": 32, "output_tokens": 16}
    recipe = CptRecipe.model_validate(usual | {"curriculum": None, **settings})
    return cpt_task(model, corpus, recipe, seed=0)


def test_a_share_of_the_steps_repeats_and_lengths_take_turns(model: RefragModel, tmp_path: Path) -> None:
    task = _task(model, tmp_path, repeat_steps_share=0.25)
    repeated = [task.repeated_chunks(step) for step in range(32)]
    assert sum(length is not None for length in repeated) in {7, 8}
    assert {length for length in repeated if length} == {1, 8}  # 8 chunks of 4 tokens are the whole context


def test_a_repeating_step_asks_for_its_own_context_after_the_start_token(model: RefragModel, tmp_path: Path) -> None:
    task = _task(model, tmp_path, repeat_steps_share=0.5)
    step = next(step for step in range(8) if task.repeated_chunks(step) == 8)
    batch = task.batch(step, 0, task.samples(step, 2), 0, 1)
    assert torch.equal(batch["output"], batch["context"].flatten(1))
    for place in (0, -1):
        assert (batch["token_ids"][:, place] == model.start_token_id).all()
        assert (batch["chunk_index"][:, place] == -1).all()
    assert (batch["chunk_index"][:, 1:-1] >= 0).all()


def test_a_repeating_step_has_no_more_positions_than_another(model: RefragModel, tmp_path: Path) -> None:
    task = _task(model, tmp_path, repeat_steps_share=0.5)
    step = next(step for step in range(8) if task.repeated_chunks(step) == 1)
    positions = [task.positions(task.batch(turn, 0, task.samples(turn, 12), 0, 1)) for turn in (step, step + 1)]
    assert positions[1] == 12 * (1 + 8 + 16)
    assert 0.7 * positions[1] < positions[0] <= positions[1]


def test_a_run_with_repeating_steps_trains_to_its_end(model: RefragModel, tmp_path: Path) -> None:
    task = _task(model, tmp_path, repeat_steps_share=0.5)
    assert train(task, task.settings, tmp_path / "work", "cpt")["steps"] == 8


def test_figures_of_a_repeating_step_are_named_as_its_own(model: RefragModel, tmp_path: Path) -> None:
    task = _task(model, tmp_path, repeat_steps_share=0.5)
    step = next(step for step in range(8) if task.repeated_chunks(step) == 8)
    batch = task.batch(step, 0, task.samples(step, 2), 0, 1)
    assert "repeat_loss" in task(batch)[1] and task.probe(batch) == {}
    assert "repeat_loss" not in task(task.batch(step + 1, 0, 2, 0, 1))[1]
