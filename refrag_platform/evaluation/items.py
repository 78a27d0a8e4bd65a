"""items.json: REFRAG's figure of every window and question, by which two versions are compared pair by pair."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from refrag_platform.corpus.question import Question
from refrag_platform.errors import ArtifactError
from refrag_platform.evaluation.metrics import rounded
from refrag_platform.evaluation.windows import Windows

FILE_NAME = "items.json"
# 1 of a question that was looked up and whose gold passage the store holds.
HELD = "retrieval_in_store"


class ItemSet(BaseModel):
    """Figures of one held-out set: a value per item and metric, in the items' order."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    digest: str = Field("", description="of the items themselves: equal digests mean the same windows or questions")
    groups: list[str] = Field(
        default_factory=list, description="what is resampled: the document of each window or question"
    )
    values: dict[str, list[float]] = Field(default_factory=dict, description="per metric")

    @model_validator(mode="after")
    def _one_value_per_item(self) -> ItemSet:
        for name, values in self.values.items():
            if len(values) != len(self.groups):
                raise ValueError(f"{name} has {len(values)} values for {len(self.groups)} items")
        return self

    @classmethod
    def of(cls, digest: str, groups: Sequence[str], values: Mapping[str, Sequence[float] | NDArray]) -> ItemSet:
        """The set with values as reports round them."""
        plain = {name: [rounded(value) for value in column] for name, column in values.items()}
        return cls(digest=digest, groups=list(groups), values=plain)

    def held_by(self, released: ItemSet) -> ItemSet:
        """The items whose gold passage a released version's store holds; all, where nothing was looked up."""
        held = released.values.get(HELD)
        if held is None:
            return self
        places = [place for place, value in enumerate(held) if value]
        values = {name: [column[place] for place in places] for name, column in self.values.items()}
        return ItemSet(digest=self.digest, groups=[self.groups[place] for place in places], values=values)


class Items(BaseModel):
    """What items.json holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    windows: ItemSet = Field(ItemSet(), description="P16 to P512 in nats, every chunk a vector")
    questions: ItemSet = Field(ItemSet(), description="exact_match and f1, at the most passages, as served")
    retrieval: ItemSet = Field(
        ItemSet(),
        description="of the questions that are looked up in the store: retrieval_in_store, retrieval_hit_1 to _20, "
        "retrieval_answered, retrieval_exact_match and retrieval_f1; 0 where the store lacks the gold passage",
    )

    def of_metric(self, name: str) -> ItemSet | None:
        """The set that has values of a metric; None when none has."""
        sets = (self.windows, self.questions, self.retrieval)
        return next((items for items in sets if name in items.values), None)

    @classmethod
    def read(cls, content: Path) -> Items:
        """The figures in an evaluation's content; none where it was made before there was such a file.

        Raises:
            ArtifactError: they can't be read.
        """
        path = content / FILE_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except ValidationError as error:
            raise ArtifactError(f"{path} is damaged ({error.error_count()} faults); evaluate the model again") from None


def windows_digest(windows: Windows) -> str:
    """One hash over the windows' tokens, and where their context ends."""
    tokens = np.ascontiguousarray(windows.tokens.numpy(), dtype="<i8")
    return _digest(f"{tokens.shape} {windows.context_tokens}".encode(), tokens.tobytes())


def questions_digest(questions: Sequence[Question], passages: int, max_new_tokens: int, order: str = "listed") -> str:
    """One hash over the questions, their answers, the passages that are read, their order, and the longest answer."""
    asked = [[one.id, one.question, one.answers, one.take(passages)] for one in questions]
    # As it was when there was no other order than the listed one.
    read = [asked, passages, max_new_tokens, *([order] if order != "listed" else [])]
    return _digest(json.dumps(read).encode())


def lookups_digest(questions: Sequence[Question], max_new_tokens: int) -> str:
    """One hash over questions, answers, gold passages and the longest answer: not over what a store finds for them."""
    asked = [
        [one.id, one.question, one.history, one.answers, [one.passages[number] for number in one.gold]]
        for one in questions
    ]
    return _digest(json.dumps([asked, max_new_tokens]).encode())


def _digest(*parts: bytes) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
