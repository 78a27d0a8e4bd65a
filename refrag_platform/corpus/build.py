"""The corpus stage: sources to token shards, passages and questions. Run: `refrag run corpus --model tiny`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from refrag_platform.corpus.bad_input import BadInput
from refrag_platform.corpus.dedup import FingerprintSet
from refrag_platform.corpus.documents import Document
from refrag_platform.corpus.passages import cut_passages
from refrag_platform.corpus.question_maker import QuestionMaker
from refrag_platform.corpus.shards import ShardWriter, token_dtype
from refrag_platform.corpus.sources import read_sources, source_records
from refrag_platform.corpus.splits import SPLITS, Split, split_of
from refrag_platform.corpus.swapping import swapped
from refrag_platform.corpus.tables import DOCUMENTS, PASSAGES, TableWriter
from refrag_platform.corpus.tokens import Tokens, tokenize
from refrag_platform.errors import RefragError
from refrag_platform.files import write_json
from refrag_platform.recipes import CorpusRecipe
from refrag_platform.stages import StageContext
from refrag_platform.weights import load_tokenizer, tokenizer_digest

COUNTED = ("documents", "tokens", "passages", "questions")


def build_corpus(context: StageContext) -> dict[str, Any]:
    """Write the corpus artifact (docs/architecture.md, formats) in memory that does not grow with the corpus.

    Raises:
        RefragError: a source is missing, bad input with `on_bad_input: stop`, or a split without documents.
    """
    recipe = context.recipe
    tokenizer = load_tokenizer(recipe.decoder, context.project.recipe_path(recipe.name).parent)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    # What looks like a special token in a document is text, as it is in passages and questions.
    backend.encode_special_tokens = True
    context.sources.extend(source_records(context.project, recipe))
    bad = BadInput(recipe.corpus.on_bad_input, context.beside / "bad_input.jsonl")
    unique = UniqueDocuments(read_sources(context.project, recipe, bad))
    with CorpusWriter(context.out, recipe.corpus, len(tokenizer)) as writer:
        for document, tokens in tokenize(unique, backend):
            writer.add(document, tokens)
    _check_splits(writer, recipe.corpus)
    questions = writer.write_questions()
    backend.save(str(context.out / "tokenizer.json"), pretty=False)
    facts: dict[str, Any] = {
        "tokenizer": tokenizer_digest(tokenizer),
        "vocabulary": len(tokenizer),
        "dtype": writer.dtype.name,
        "shard_tokens": recipe.corpus.shard_tokens,
        "documents": {split: shard.documents for split, shard in writer.shards.items()},
        "tokens": {split: shard.tokens for split, shard in writer.shards.items()},
        "passages": writer.passages_of,
        "questions": questions,
        "duplicates": unique.duplicates,
        "bad_input": dict(sorted(bad.counts.items())),
    }
    write_json(context.out / "corpus.json", facts)
    return {
        **{key: {**facts[key], "total": sum(facts[key].values())} for key in COUNTED},
        "duplicates": unique.duplicates,
        "bad_input": {**facts["bad_input"], "total": bad.counts.total()},
    }


class UniqueDocuments:
    """Documents without those whose text has come before; `duplicates` counts what was dropped."""

    def __init__(self, documents: Iterator[Document]) -> None:
        self.duplicates = 0
        self._documents = documents

    def __iter__(self) -> Iterator[Document]:
        seen = FingerprintSet()
        for document in self._documents:
            if seen.add(document.sha256):
                yield document
            else:
                self.duplicates += 1


class CorpusWriter:
    """Writes shards, documents.parquet and passages.parquet as documents come, and the questions at the end."""

    def __init__(self, out: Path, recipe: CorpusRecipe, vocabulary: int) -> None:
        self.dtype = token_dtype(vocabulary)
        self._out, self._recipe = out, recipe
        self._files = ExitStack()
        self.shards: dict[Split, ShardWriter] = {
            split: ShardWriter(out / split, self.dtype, recipe.shard_tokens) for split in SPLITS
        }
        self.documents = TableWriter(out / "documents.parquet", DOCUMENTS)
        self.passages = TableWriter(out / "passages.parquet", PASSAGES)
        self.passages_of: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self._questions = QuestionMaker(recipe.questions_per_document, recipe.passages_per_question)

    def __enter__(self) -> CorpusWriter:
        for shard in self.shards.values():
            self._files.enter_context(shard)
        for table in (self.documents, self.passages):
            self._files.enter_context(table)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._files.__exit__(*exception)

    def add(self, document: Document, tokens: Tokens) -> None:
        split = split_of(document.group, self._recipe)
        shard, start = self.shards[split].add(tokens.ids)
        self.documents.add(
            {
                "id": document.id,
                "title": document.title,
                "source": document.source,
                "split": split,
                "shard": shard,
                "start": start,
                "tokens": len(tokens.ids),
                "characters": len(document.text),
                "sha256": document.sha256,
            }
        )
        passages = list(cut_passages(document, tokens, self._recipe.passage_tokens))
        self.passages_of[split] += len(passages)
        for passage in passages:
            self.passages.add(
                {
                    "id": passage.id,
                    "document_id": document.id,
                    "title": passage.title,
                    "text": passage.text,
                    "split": split,
                }
            )
        if document.facts:
            self._questions.add(document, split, passages)

    def write_questions(self) -> dict[Split, int]:
        """questions/SPLIT.jsonl; returns how many each has."""
        folder = self._out / "questions"
        folder.mkdir()
        counts: dict[Split, int] = {}
        for split in SPLITS:
            questions = list(self._questions.questions(split))
            if split == "train":
                questions = [*questions, *swapped(questions, self._recipe.swapped_copies)]
            lines = (json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            counts[split] = len(questions)
        return counts


def _check_splits(writer: CorpusWriter, recipe: CorpusRecipe) -> None:
    empty = [split for split, shard in writer.shards.items() if not shard.documents]
    if empty:
        raise RefragError(
            f"no document fell into {' and '.join(empty)}: {writer.documents.rows} documents with "
            f"corpus.validation_share {recipe.validation_share} and corpus.test_share {recipe.test_share}. Add "
            "documents (data/sources/NAME, corpus.sources), or raise the share of the empty split"
        )
