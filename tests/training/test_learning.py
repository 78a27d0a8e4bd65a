"""The stages learn: the vectors carry text, and the policy finds the chunks that matter."""

from pathlib import Path

import numpy as np
import pytest
import torch

from refrag_platform.model.policy import budget, keep_mask, sample_picks, select
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import Recipe
from refrag_platform.training.core.loop import train
from refrag_platform.training.core.windows import WindowSampler
from refrag_platform.training.cpt import cpt_task
from refrag_platform.training.episodes import collate, window_episode
from refrag_platform.training.policy import policy_task
from refrag_platform.training.reconstruction import ReconstructionTask
from tests.training.conftest import repeating_documents, write_corpus

RATES = {"encoder_learning_rate": 3e-3, "projection_learning_rate": 3e-3, "decoder_learning_rate": 3e-3}


def test_reconstruction_leaves_the_decoder_as_it_was_and_lowers_the_loss(
    recipe: Recipe, model: RefragModel, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus", repeating_documents(16, 4, 500, range(100, 116)))
    wanted = recipe.reconstruction.model_copy(
        update={"steps": 60, "batch_size": 8, "log_every": 10, "curriculum": None, **RATES}
    ).model_copy(update={"curriculum": recipe.reconstruction.curriculum.model_copy(update={"max_factor": 2})})
    before = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
    windows = {f: WindowSampler(corpus, "train", f * model.chunk_size, 0) for f in (1, 2)}
    summary = train(ReconstructionTask(model, wanted, windows, 0), wanted, tmp_path / "work", "reconstruction")
    assert summary["last"]["helper_loss" if "helper_loss" in summary["last"] else "loss"] < summary["first_loss"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.decoder.state_dict().items())


@pytest.mark.slow
def test_on_a_copy_task_refrag_beats_shuffled_chunks_by_a_nat(
    recipe: Recipe, model: RefragModel, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus", repeating_documents(16, 4, 20_000, range(100, 132)))
    wanted = recipe.cpt.model_copy(
        update={
            "steps": 250,
            "batch_size": 64,
            "context_tokens": 16,
            "output_tokens": 16,
            "curriculum": None,
            "mixed_steps_share": 0.0,
            "log_every": 50,
            **RATES,
        }
    )
    last = train(cpt_task(model, corpus, wanted, 0), wanted, tmp_path / "work", "copy")["last"]
    assert last["shuffled_loss"] - last["own_loss"] >= 1.0
    assert last["own_loss"] < np.log(32) - 1.0  # a copy, not a guess among the 32 ids


def one_telling_chunk(count: int, seed: int) -> list[np.ndarray]:
    """Contexts of four chunks, three of them filler; what follows repeats the context."""
    random = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        block = np.full((4, 4), 50)
        block[random.integers(4)] = random.integers(100, 132, 4)
        documents.append(np.tile(block.reshape(-1), 3))
    return documents


@pytest.mark.slow
def test_the_policy_beats_random_choice_with_an_interval_above_zero(
    recipe: Recipe, model: RefragModel, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus", one_telling_chunk(20_000, 0))
    sizes = {"context_tokens": 16, "output_tokens": 16}
    reading = recipe.cpt.model_copy(
        update={
            "steps": 250,
            "batch_size": 32,
            "curriculum": None,
            "mixed_steps_share": 1.0,
            "mixed_share_kept": 0.5,
            **sizes,
            **RATES,
            "encoder_learning_rate": 0.0,
            "projection_learning_rate": 0.0,
        }
    )
    train(cpt_task(model, corpus, reading, 0), reading, tmp_path / "reading", "reading")
    wanted = recipe.policy.model_copy(
        update={"steps": 40, "batch_size": 16, "learning_rate": 3e-3, "share_kept": 0.25, **sizes}
    )
    task = policy_task(model, corpus, wanted, 0)
    train(task, wanted, tmp_path / "policy", "policy")

    unseen = WindowSampler(write_corpus(tmp_path / "unseen", one_telling_chunk(400, 1)), "train", 32, 0).batch(
        0, 0, 200
    )
    batch = collate([window_episode(window, 16, model) for window in unseen], 0.25, 4)
    with torch.no_grad():
        given = task.observe(batch)
        chosen = select(task.policy(**given), None, 0.25)[:, None]
    generator = torch.Generator().manual_seed(0)
    random = keep_mask(sample_picks(torch.zeros(200, 4), budget(4, 0.25), 4, generator), 4)
    rewards = [task.rewards(batch, given["vectors"], keep).mean(1) for keep in (chosen, random)]
    gain = (rewards[0] - rewards[1]).numpy()
    resampled = np.random.default_rng(0).choice(gain, (2000, len(gain))).mean(1)
    assert np.quantile(resampled, 0.025) > 0
