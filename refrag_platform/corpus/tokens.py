"""Documents to token ids, many at once, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from refrag_platform.corpus.documents import Document

# Characters tokenized in one call: enough to keep every core busy, few enough to hold.
BATCH_CHARACTERS = 1_000_000
BLOCK_CHARACTERS = 32_768
# A word's start with the one space or newline before it, which byte-level tokenizers join to the word:
# cut there, a text has the same tokens as a whole.
_WORD_START = re.compile(r"\s\S")


@dataclass(frozen=True)
class Tokens:
    """A document's tokens. `ends[i]` is the character position where token i ends."""

    ids: np.ndarray
    ends: np.ndarray


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, Tokens]]:
    """Each document with its tokens (no special tokens added), in order."""
    waiting: list[Document] = []
    characters = 0
    for document in documents:
        waiting.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield from _tokenize_batch(waiting, tokenizer)
            waiting, characters = [], 0
    yield from _tokenize_batch(waiting, tokenizer)


def blocks(text: str) -> list[tuple[int, int]]:
    """Spans of at most about BLOCK_CHARACTERS that cover the text and begin where a word begins."""
    spans, start = [], 0
    while len(text) - start > BLOCK_CHARACTERS:
        match = _WORD_START.search(text, start + BLOCK_CHARACTERS)
        if match is None:
            break
        spans.append((start, match.start()))
        start = match.start()
    return [*spans, (start, len(text))]


def _tokenize_batch(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, Tokens]]:
    work = [(number, span) for number, document in enumerate(documents) for span in blocks(document.text)]
    pieces: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in documents]
    for batch in _batches(work):
        texts = [documents[number].text[start:end] for number, (start, end) in batch]
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        for (number, (start, _)), encoding in zip(batch, encodings, strict=True):
            offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            pieces[number].append((np.asarray(encoding.ids, dtype=np.int64), offsets[:, 1] + start))
    for document, parts in zip(documents, pieces, strict=True):
        ids, ends = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        # Tokens that share a character's bytes must not make the positions run back.
        yield document, Tokens(ids, np.maximum.accumulate(ends) if len(ends) else ends)


def _batches(work: list[tuple[int, tuple[int, int]]]) -> Iterator[list[tuple[int, tuple[int, int]]]]:
    """Spans in groups of about BATCH_CHARACTERS, so that a very long document is not encoded in one call."""
    batch, characters = [], 0
    for item in work:
        batch.append(item)
        characters += item[1][1] - item[1][0]
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
