"""Packed windows: the same losses as the windows one by one, for every system and with chunks kept as tokens."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from refrag_platform.errors import RecipeError
from refrag_platform.model.decoder import token_losses
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import CptRecipe, Recipe, TrainedSystem
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.core.loop import train
from refrag_platform.training.core.precision import autocast
from refrag_platform.training.cpt import CptTask, cpt_task
from tests.training.conftest import repeating_documents, write_corpus

# Tokens of context and of a block; the tiny model's k is 4.
CONTEXT, BLOCK = 32, 8


def packed_task(
    model: RefragModel,
    folder: Path,
    system: TrainedSystem = "refrag",
    **settings: object,
) -> CptTask:
    corpus = folder / "corpus"
    if not corpus.exists():
        write_corpus(corpus, repeating_documents(64, 4, 8, range(10, 200)))
    given = {"steps": 8, "batch_size": 3, "precision": "fp32", "context_tokens": CONTEXT, "output_tokens": BLOCK,
             "curriculum": None, "packed": True, "mixed_steps_share": 0.0}  # fmt: skip
    return cpt_task(model, corpus, CptRecipe.model_validate(given | settings), seed=0, system=system)


def _window_loss(task: CptTask, batch: Batch, block: int) -> Tensor:
    """Mean loss of one block, computed as a window of its own: a context and the o tokens after it."""
    model, k = task.model, task.model.chunk_size
    whole = torch.cat([batch["context"].flatten(1)[:, :BLOCK], batch["output"]], 1)
    context, output = whole[:, : (block + 1) * BLOCK], whole[:, (block + 1) * BLOCK : (block + 2) * BLOCK]
    embed = model.decoder.get_input_embeddings()
    inputs = embed(torch.full((len(context), 1), model.start_token_id))
    if task.system == "refrag":
        vectors = model.project(model.encode(context.reshape(-1, k), padded=False))
        inputs = torch.cat([inputs, vectors.view(len(context), -1, vectors.shape[-1])], 1)
    elif task.system != "none":
        inputs = torch.cat([inputs, embed(context[:, -CONTEXT // k :] if task.system == "truncated" else context)], 1)
    hidden = model.decoder.get_decoder()(inputs_embeds=torch.cat([inputs, embed(output)], 1)).last_hidden_state
    states = hidden[:, inputs.shape[1] - 1 : -1].flatten(0, 1)
    return token_losses(states, model.decoder.get_output_embeddings().weight, output.flatten()).mean()


@pytest.mark.parametrize("system", ["refrag", "full", "none", "truncated"])
def test_packed_windows_have_the_losses_of_windows_one_by_one(
    model: RefragModel, tmp_path: Path, system: TrainedSystem
) -> None:
    task = packed_task(model, tmp_path, system)
    batch = task.batch(0, 0, 3, 0, 1)
    assert batch["output"].shape == (3, CONTEXT)
    expected = torch.stack([_window_loss(task, batch, block) for block in range(CONTEXT // BLOCK)])
    assert len(set(expected.tolist())) == CONTEXT // BLOCK
    assert torch.allclose(task(batch)[0], expected.mean(), atol=1e-5)


def test_blocks_see_chunks_that_are_kept_as_tokens(model: RefragModel, tmp_path: Path) -> None:
    """Every chunk kept: each block reads the text before it, as the control on full contexts does."""
    task = packed_task(model, tmp_path, mixed_steps_share=1.0, mixed_share_kept=1.0)
    full = packed_task(model, tmp_path, "full")
    batch = task.batch(0, 0, 3, 0, 1)
    assert torch.allclose(task(batch)[0], full(batch)[0], atol=1e-5)


def test_rows_that_keep_different_chunks_are_laid_out_each_by_itself(model: RefragModel, tmp_path: Path) -> None:
    task = packed_task(model, tmp_path, mixed_steps_share=1.0, mixed_share_kept=0.25)
    batch = task.batch(0, 0, 3, 0, 1)
    assert len({tuple(row) for row in batch["known"].tolist()}) > 1
    single = torch.stack([task(_row(batch, row))[0] for row in range(3)])
    assert torch.allclose(task(batch)[0], single.mean(), atol=1e-5)


def test_low_rank_updates_train_on_packed_windows_in_lower_precision(model: RefragModel, tmp_path: Path) -> None:
    task = packed_task(model, tmp_path, lora_rank=2)
    with autocast("bf16", torch.device("cpu")):
        loss = task(task.batch(0, 0, 3, 0, 1))[0]
    loss.backward()
    updates = [p for name, p in model.decoder.named_parameters() if "lora_B" in name]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in updates)


@pytest.mark.parametrize(("system", "positions"), [("refrag", 41), ("full", 41), ("none", 36), ("truncated", 68)])
def test_positions_are_those_that_the_decoder_reads(
    model: RefragModel, tmp_path: Path, system: TrainedSystem, positions: int
) -> None:
    task = packed_task(model, tmp_path, system)
    assert task.positions(task.batch(0, 0, 3, 0, 1)) == 3 * positions


def _row(batch: Batch, row: int) -> Batch:
    one = {key: value[row : row + 1] for key, value in batch.items()}
    chunks = batch["context"].shape[1]
    index = one["chunk_index"]
    return one | {"chunk_index": torch.where(index >= 0, index - row * chunks, -1)}


def test_a_packed_run_trains_with_every_kind_of_step(model: RefragModel, tmp_path: Path) -> None:
    task = packed_task(
        model, tmp_path, repeat_steps_share=0.25, mixed_steps_share=0.25, mixed_share_kept=0.25, log_every=1
    )
    summary = train(task, task.settings, tmp_path / "work", "cpt")
    assert summary["steps"] == 8
    assert {"own_loss", "shuffled_loss"} <= set(summary["last"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"curriculum": {}}, "curriculum: null"),
        ({"output_tokens": 12}, r"context_tokens \(32\) must be at least twice output_tokens \(12\), and a multiple"),
        ({"output_tokens": 32}, r"context_tokens \(32\) must be at least twice output_tokens \(32\)"),
    ],
)
def test_settings_that_can_not_be_packed_are_refused(
    model: RefragModel, tmp_path: Path, settings: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        packed_task(model, tmp_path, **settings)


def test_truncated_needs_blocks_as_long_as_what_it_reads(model: RefragModel, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"output_tokens is 4 .* reads 8 tokens"):
        packed_task(model, tmp_path, "truncated", output_tokens=4)


def test_blocks_must_hold_whole_chunks(recipe: Recipe) -> None:
    values = recipe.model_dump(mode="json")
    values["cpt"] |= {"packed": True, "curriculum": None, "context_tokens": 24, "output_tokens": 6}
    with pytest.raises(ValueError, match=r"cpt.output_tokens \(6\) must be a multiple of encoder.chunk_size \(4\)"):
        Recipe.model_validate(values)
