"""The planted task: one fact that is asked for, among facts of the same form about other keys."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from refrag_platform.model.decoder import decoder_states
from refrag_platform.model.policy import PolicyNetwork, Query, select
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import pack_slots
from refrag_platform.recipes import Recipe
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.core.loop import train
from refrag_platform.training.episodes import Episode, collate, context_vectors
from refrag_platform.training.evidence import HAS_ANSWER
from refrag_platform.training.policy import PolicyTask

FACTS, SHARE = 8, 1 / 8
KEY, IS, ASK = 10, 11, 12
KEYS, VALUES = range(100, 132), range(200, 232)


class Facts:
    """Chunks `KEY key IS value`; the question names one key, the answer is its value."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def draw(self, step: int, rows: Sequence[int]) -> list[Episode]:
        return [self._episode(step, row) for row in rows]

    def _episode(self, step: int, row: int) -> Episode:
        random = np.random.default_rng([self.seed, step, row])
        keys, values = (torch.from_numpy(random.choice(ids, FACTS, replace=False)) for ids in (KEYS, VALUES))
        chunks = torch.stack([torch.full((FACTS,), KEY), keys, torch.full((FACTS,), IS), values], 1)
        asked = int(random.integers(FACTS))
        question = [ASK, int(keys[asked])]
        holds_it = torch.where(torch.arange(FACTS) == asked, HAS_ANSWER, 0)
        return Episode(chunks, [int(values[asked])], after=question, question=question, evidence=holds_it)

    def batch(self, step: int, size: int) -> Batch:
        return collate(self.draw(step, range(size)), SHARE, 4)


def the_fact(batch: Batch) -> Tensor:
    """Flags [B, FACTS]: the chunk about the key that is asked for."""
    return batch["chunks"][..., 1] == batch["question"][:, :1, 1]


@pytest.fixture
def reader(model: RefragModel) -> RefragModel:
    """A tiny model that has learnt to copy a value from an expanded chunk; compressed, it can't tell the values."""
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=3e-3)
    rows = torch.arange(32)
    for step in range(120):
        batch = Facts(2).batch(step, len(rows))
        with torch.no_grad():
            projected = model.project(context_vectors(model, batch).flatten(0, 1))
        token_ids, index, positions = pack_slots(batch["slots"], batch["owners"], the_fact(batch), batch["length"])
        hidden = decoder_states(model.decoder, model.gather(token_ids, index, projected))[rows, positions - 2]
        logits = model.decoder.get_output_embeddings()(hidden)
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def hit_rate(recipe: Recipe, reader: RefragModel, query: Query, work: Path, **values: object) -> float:
    """Share of unseen contexts in which the trained policy keeps the fact that is asked for."""
    settings = recipe.policy.model_copy(
        update={
            "query": query,
            "question_share": 1.0,
            "steps": 100,
            "batch_size": 32,
            "group_size": 8,
            "updates_per_batch": 4,
            "learning_rate": 3e-3,
            "share_kept": SHARE,
            "hidden_size": 64,
            **values,
        }
    )
    torch.manual_seed(0)
    policy = PolicyNetwork(reader.vector_dim, 64, 2, 2, SHARE, query)
    task = PolicyTask(reader, policy, settings, None, Facts(0), 0)  # type: ignore[arg-type]
    train(task, settings, work, f"policy, query {query}")
    unseen = Facts(1).batch(0, 400)
    with torch.no_grad():
        keep = select(policy(**task.observe(unseen)), None, SHARE)
    assert (keep.sum(1) == 1).all()
    return float((keep & the_fact(unseen)).any(1).float().mean())


@pytest.mark.slow
def test_a_policy_given_the_question_keeps_the_fact_and_a_blind_one_stays_at_chance(
    recipe: Recipe, reader: RefragModel, tmp_path: Path
) -> None:
    assert hit_rate(recipe, reader, "question", tmp_path / "question") >= 0.95
    # 400 draws at 1 / 8: three standard deviations are 0.05.
    assert abs(hit_rate(recipe, reader, "none", tmp_path / "none") - 1 / FACTS) < 0.06


@pytest.mark.slow
def test_a_policy_told_where_the_answers_stand_keeps_the_fact_without_a_reward(
    recipe: Recipe, model: RefragModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_reader(*given: object) -> Tensor:
        raise AssertionError("the decoder was asked")

    monkeypatch.setattr(PolicyTask, "probe", lambda task, batch: {})
    monkeypatch.setattr(PolicyTask, "rewards", no_reader)
    assert hit_rate(recipe, model, "question", tmp_path, steps=60, evidence_steps=60) >= 0.95
