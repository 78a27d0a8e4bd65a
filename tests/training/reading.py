"""A small reading task for the tests: texts that are made up, and the task that asks about them."""

from pathlib import Path
from typing import Any

import numpy as np

from refrag_platform.model.prompts import content_ids
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import CptRecipe, ReadingRecipe, TrainedSystem
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.cpt import CptTask, cpt_task
from tests.training.conftest import write_corpus

NAMES = ("Ada Lovelace", "Karl Benz", "Mary Anning", "Ibn Sina", "Nikola Tesla", "Grace Hopper")
PLACES = ("London", "Mannheim", "Lyme Regis", "Hamadan", "Smiljan", "New York")


def _text(number: int) -> str:
    chance = np.random.default_rng(number)
    lines = []
    for year in range(1800, 1812):
        name, place = NAMES[chance.integers(6)], PLACES[chance.integers(6)]
        lines.append(f"In the year {year + number} the engineer {name} built a large machine near {place}.")
    return " ".join(lines)


TEXTS = [_text(number) for number in range(6)]


def reading_task(
    model: RefragModel, folder: Path, system: TrainedSystem = "refrag", workers: int = 0, **reading: Any
) -> CptTask:
    """Reading over a corpus of the texts, with four blocks of 96 tokens about each of two contexts."""
    documents = [np.array(content_ids(model.tokenizer, text)) for text in TEXTS]
    settings = CptRecipe(
        steps=6, batch_size=2, precision="fp32", context_tokens=256, output_tokens=16, curriculum=None, workers=workers,
        reading=ReadingRecipe(**{"blocks": 4, "block_tokens": 96, "steps_share": 0.99} | reading),
    )  # fmt: skip
    return cpt_task(model, write_corpus(folder / "corpus", documents), settings, 0, system)


def batch_of(task: CptTask, step: int = 1) -> Batch:
    """Both contexts of a step, with what is asked about them."""
    return task.batch(step, 0, 2, 0, 1)
