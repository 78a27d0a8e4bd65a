"""Small corpora and a tiny model for the training tests."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from refrag_platform.corpus.shards import ShardWriter
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe
from tests.conftest import ROOT


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return Project(ROOT).recipe("tiny")


@pytest.fixture
def model(recipe: Recipe) -> RefragModel:
    return RefragModel.create(recipe, Project(ROOT).recipe_path("tiny").parent)


def write_corpus(folder: Path, documents: list[np.ndarray], splits: Sequence[str] = ("train",)) -> Path:
    """A corpus folder each of whose splits is these documents; enough for training, no passages or questions."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        with ShardWriter(folder / split, np.dtype("<u2"), 65_536) as writer:
            for document in documents:
                writer.add(document)
    (folder / "corpus.json").write_text(json.dumps({"shard_tokens": 65_536, "dtype": "uint16"}))
    return folder


def repeating_documents(period: int, repeats: int, count: int, ids: range, seed: int = 0) -> list[np.ndarray]:
    """Documents that repeat a random block: after one period, the next tokens are a copy of the context."""
    random = np.random.default_rng(seed)
    return [np.tile(random.integers(ids.start, ids.stop, period), repeats) for _ in range(count)]
