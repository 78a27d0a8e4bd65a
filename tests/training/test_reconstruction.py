"""Reconstruction: who is trained, and what the helper loss sees."""

from pathlib import Path

import pytest
import torch

from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import CurriculumRecipe, ReconstructionRecipe
from refrag_platform.training.core.loop import train
from refrag_platform.training.reconstruction import ReconstructionTask, reconstruction_task
from tests.training.conftest import repeating_documents, write_corpus


def _task(model: RefragModel, folder: Path, **settings: object) -> ReconstructionTask:
    corpus = write_corpus(folder / "corpus", repeating_documents(64, 4, 8, range(10, 200)))
    recipe = ReconstructionRecipe(
        steps=3, batch_size=2, precision="fp32", curriculum=CurriculumRecipe(max_factor=2, stages=2), **settings
    )
    return reconstruction_task(model, corpus, recipe, 0)


@pytest.mark.parametrize("train_decoder", [False, True])
def test_the_decoder_learns_only_where_the_recipe_says(model: RefragModel, tmp_path: Path, train_decoder: bool) -> None:
    rates = {"decoder_learning_rate": 1e-3} if train_decoder else {}
    task = _task(model, tmp_path, train_decoder=train_decoder, **rates)
    before = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
    train(task, task.settings, tmp_path / "work", "reconstruction")
    changed = [name for name, tensor in model.decoder.state_dict().items() if not torch.equal(tensor, before[name])]
    assert bool(changed) == train_decoder


def test_the_helper_loss_does_not_reward_large_vectors(model: RefragModel, tmp_path: Path) -> None:
    task = _task(model, tmp_path)
    chunks = torch.arange(10, 10 + 4 * model.chunk_size).view(4, -1)
    embeds, chosen = model.project(model.encode(chunks)).detach(), torch.arange(4)
    once, larger = (task.helper_loss(embeds * size, chunks, chosen) for size in (1.0, 40.0))
    torch.testing.assert_close(once, larger, rtol=1e-3, atol=1e-3)
