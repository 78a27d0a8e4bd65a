"""How near a retriever finds passages to a question: what a policy may be told beside the chunks (ours).

Rounded, so that texts which were embedded beside others, or by a store, say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.prompts import passage_text
from refrag_platform.model.segments import Chunks
from refrag_platform.recipes import Recipe
from refrag_platform.store.content import PASSAGES_FILE, StoreDescription
from refrag_platform.store.retriever import Retriever, load_retriever

if TYPE_CHECKING:
    from refrag_platform.corpus.question import Passage

DECIMALS = 3


class PassageRelevance:
    """The dot product of question and passage by a retriever's unit vectors; every text is embedded once.

    It can take the retriever's place in a store, whose search then embeds nothing again.
    """

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self.name, self.dim = retriever.name, retriever.dim
        self._vectors: dict[str, NDArray[np.float32]] = {}

    @property
    def digest(self) -> str:
        """The retriever's."""
        return self._retriever.digest

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The retriever's vectors [len(texts), dim]."""
        self.learn(texts, [])
        return np.stack([self._vectors[text] for text in texts])

    def learn(self, questions: Sequence[str], passages: Sequence[Passage]) -> None:
        """Embed what will be asked for, together: far faster than one after another."""
        texts = [*questions, *(passage_text(*passage) for passage in passages)]
        new = list(dict.fromkeys(text for text in texts if text not in self._vectors))
        if new:
            self._vectors.update(zip(new, self._retriever.encode(new), strict=True))

    def take_stored(self, content: Path) -> None:
        """Take the passages' vectors from a chunk store, where the same retriever has made them."""
        import pyarrow.parquet as parquet

        if StoreDescription.read(content).retriever_digest != self._retriever.digest:
            return
        columns = ["title", "text", "retrieval_vector"]
        for batch in parquet.ParquetFile(content / PASSAGES_FILE).iter_batches(columns=columns):
            vectors = np.stack(batch.column("retrieval_vector").to_numpy(zero_copy_only=False)).astype(np.float32)
            titles, texts = (batch.column(name).to_pylist() for name in ("title", "text"))
            self._vectors.update(zip(map(passage_text, titles, texts), vectors, strict=True))

    def of(self, question: str, passages: Sequence[Passage]) -> list[float]:
        """The relevance of each passage, -1 to 1."""
        self.learn([question], passages)
        asked = self._vectors[question]
        return [relevance(asked, self._vectors[passage_text(*passage)]) for passage in passages]

    def tell(self, question: str, passages: Sequence[Passage], cut: Sequence[Chunks]) -> list[Chunks]:
        """The passages, cut into chunks, each with its relevance."""
        return [
            replace(chunks, relevance=value) for chunks, value in zip(cut, self.of(question, passages), strict=True)
        ]


def relevance(question: NDArray[np.float32], passage: NDArray[np.float32]) -> float:
    """The relevance of two unit vectors."""
    return round(float(question @ passage), DECIMALS)


def relevance_for(
    policy: PolicyNetwork | None, recipe: Recipe, base: Path, device: torch.device | str
) -> PassageRelevance | None:
    """What a policy that reads relevance is to be told, by the store's retriever; None for any other policy.

    Args: base: the recipe's folder, for `path:` sources.
    """
    return recipe_relevance(recipe, base, device) if policy and policy.reads_relevance else None


def recipe_relevance(recipe: Recipe, base: Path, device: torch.device | str) -> PassageRelevance:
    """Relevance by a recipe's retriever: `policy.relevance`, where it is set, names the store's, too."""
    return PassageRelevance(load_retriever(recipe.chunks.retriever, base, device))
