"""Golden batches: what each task puts before the decoder at fixed steps on tiny, with a fixed seed.

A change of the code that lays out prompts leaves these digests; one of what is drawn writes them anew, and says why.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import pack_slots
from refrag_platform.recipes import Recipe
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.core.loop import Task
from refrag_platform.training.cpt import cpt_task
from refrag_platform.training.examples import Examples
from refrag_platform.training.finetuned import FinetunedTask
from refrag_platform.training.policy import policy_task
from tests.training.conftest import repeating_documents, write_corpus
from tests.training.reading import reading_task
from tests.training.test_examples import write_questions

STEPS = 6


def cpt(**changes: Any) -> Callable[[RefragModel, Path, Recipe], Task]:
    return lambda model, corpus, recipe: cpt_task(model, corpus, recipe.cpt.model_copy(update=changes), 0)


def finetuned(system: Any) -> Callable[[RefragModel, Path, Recipe], Task]:
    tasks = {"tasks": {"rag": 0.7, "multi_turn": 0.3}, "kept_prompts_share": 0.5, "most_share_kept": 0.5}

    def make(model: RefragModel, corpus: Path, recipe: Recipe) -> Task:
        settings = recipe.finetuned.model_copy(update=tasks)
        return FinetunedTask(model, settings, Examples(corpus, settings, 0), system)

    return make


def policy(question_share: float) -> Callable[[RefragModel, Path, Recipe], Task]:
    return lambda model, corpus, recipe: policy_task(
        model, corpus, recipe.policy.model_copy(update={"question_share": question_share}), 0
    )


def reading(system: Any) -> Callable[[RefragModel, Path, Recipe], Task]:
    return lambda model, corpus, recipe: reading_task(model, corpus.parent / "reading", system)


TASKS = {
    "cpt": cpt(),
    "cpt-mixed": cpt(curriculum=None, mixed_steps_share=1.0, mixed_share_kept=0.5),
    "finetuned": finetuned("refrag"),
    "finetuned-truncated": finetuned("truncated"),
    "policy-windows": policy(0.0),
    "policy-questions": policy(1.0),
    "reading": reading("refrag"),
    "reading-full": reading("full"),
    "reading-none": reading("none"),
}
GOLDEN = {
    "cpt": "fc88ab72bd74c39d",
    "cpt-mixed": "55d957f17008c0b6",
    "finetuned": "5968451da9c052be",
    "finetuned-truncated": "bea65f8f866dfd40",
    "policy-windows": "eb31c883d77b892a",
    "policy-questions": "e3acf74e5f9aa3c6",
    "reading": "e90461008fa12e30",
    "reading-full": "5c98017e75ebedf6",
    "reading-none": "c6981db5e4c8d537",
}


def laid_out(batch: Batch) -> dict[str, Any]:
    """The batch with what the decoder reads in place of the slots that it is packed from."""
    if "slots" not in batch:
        return batch
    slots, owners = batch.pop("slots"), batch.pop("owners")
    chunks = torch.arange(batch["chunks"].shape[1])
    keep = batch["keep"] if "keep" in batch else chunks < batch["kept"][:, None]
    token_ids, index, positions = pack_slots(slots, owners, keep, batch["length"])
    return batch | {"token_ids": token_ids, "index": index, "positions": positions}


@pytest.mark.parametrize("run", TASKS)
def test_batches_are_what_they_were(recipe: Recipe, model: RefragModel, tmp_path: Path, run: str) -> None:
    corpus = write_corpus(tmp_path / "corpus", repeating_documents(16, 10, 40, range(100, 132)))
    write_questions(corpus)
    task, digest = TASKS[run](model, corpus, recipe), hashlib.sha256()
    for step in range(STEPS):
        for name, value in sorted(laid_out(task.batch(step, 0, 4, 0, 1)).items()):
            array = np.asarray(value)
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[run]
