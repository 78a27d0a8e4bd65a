"""Held-out windows: a context of s tokens and the o tokens after it, at most a fair number per document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from refrag_platform.corpus.shards import TokenShards
from refrag_platform.errors import RefragError

if TYPE_CHECKING:
    from refrag_platform.model.refrag import RefragModel

TokenIds = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Windows:
    """tokens: [W, s + o] token ids; documents: the document of each window."""

    tokens: Tensor
    documents: list[str]
    context_tokens: int

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def context(self) -> Tensor:
        """[W, s]"""
        return self.tokens[:, : self.context_tokens]

    @property
    def output(self) -> Tensor:
        """[W, o]"""
        return self.tokens[:, self.context_tokens :]

    def of_another_document(self) -> list[int] | None:
        """For each window the number of a window of another document; None with only one document."""
        if len(set(self.documents)) < 2:
            return None
        count = len(self)
        return [
            next(
                (number + step) % count
                for step in range(1, count)
                if self.documents[(number + step) % count] != self.documents[number]
            )
            for number in range(count)
        ]


def place_windows(lengths: Sequence[int], window: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Where the windows begin: (document, first token), in the documents' order.

    Windows don't overlap and lie evenly spread over their document. Documents take turns until `count`
    windows are placed or no document has room; when there are more documents than windows, `seed` draws
    which ones give one.
    """
    room = [length // window for length in lengths]
    open_documents = [number for number, size in enumerate(room) if size]
    if len(open_documents) > count:
        drawn = np.random.default_rng(seed).choice(len(open_documents), count, replace=False)
        open_documents = [open_documents[number] for number in sorted(drawn)]
    quota = dict.fromkeys(open_documents, 0)
    left = count
    while left and open_documents:
        for number in open_documents[:left]:
            quota[number] += 1
            left -= 1
        open_documents = [number for number in open_documents if quota[number] < room[number]]
    places = []
    for number, windows in quota.items():
        slack = lengths[number] - windows * window
        places += [(number, turn * window + slack * (turn + 1) // (windows + 1)) for turn in range(windows)]
    return places


def split_windows(corpus: Path, split: str, context_tokens: int, output_tokens: int, count: int, seed: int) -> Windows:
    """Windows of a corpus' split, read from its memory-mapped shards.

    Raises:
        RefragError: no document of the split is long enough.
    """
    shards, window = TokenShards(corpus, split), context_tokens + output_tokens
    starts, lengths = shards.documents
    places = place_windows(lengths.tolist(), window, count, seed)
    if not places:
        raise _too_short(window, int(max(lengths, default=0)))
    begins = np.array([int(starts[number]) + begin for number, begin in places])
    return Windows(
        torch.from_numpy(shards.windows(begins, window)), [str(number) for number, _ in places], context_tokens
    )


def cut_windows(
    documents: Iterable[tuple[str, TokenIds]], context_tokens: int, output_tokens: int, count: int, seed: int
) -> Windows:
    """Windows of (id, token ids) documents, of which only as many as windows are held at a time.

    Raises:
        RefragError: no document has context_tokens + output_tokens tokens.
    """
    window = context_tokens + output_tokens
    kept = _draw(documents, window, count, np.random.default_rng(seed))
    places = place_windows([len(tokens) for _, tokens in kept], window, count, seed)
    rows = [np.asarray(kept[number][1][begin : begin + window], np.int64) for number, begin in places]
    return Windows(torch.from_numpy(np.stack(rows)), [kept[number][0] for number, _ in places], context_tokens)


def document_windows(
    path: Path, model: RefragModel, context_tokens: int, output_tokens: int, count: int, seed: int
) -> Windows:
    """Windows of the documents of a file or folder, whose contexts are whole chunks of a model.

    Raises:
        RefragError: the context isn't a multiple of k; or as `read_documents` and `cut_windows`.
    """
    if context_tokens % model.chunk_size:
        raise RefragError(f"--context is {context_tokens}; it must be a multiple of the model's k, {model.chunk_size}")
    return cut_windows(read_documents(path, model.tokenizer), context_tokens, output_tokens, count, seed)


def read_documents(path: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, TokenIds]]:
    """(id, token ids) of every document of a file or folder, in the formats of the corpus' `files` source.

    Bad rows are told on stderr and skipped.

    Raises:
        RefragError: there is no such file.
    """
    from tokenizers import Tokenizer

    from refrag_platform.corpus.bad_input import BadInput
    from refrag_platform.corpus.files import read_file
    from refrag_platform.corpus.listing import find_files, sizes
    from refrag_platform.corpus.tokens import tokenize
    from refrag_platform.names import name_text
    from refrag_platform.progress import Progress
    from refrag_platform.recipes import SourceRecipe

    if not path.exists():
        raise RefragError(
            f"no documents at {path}; give a .txt, .md, .jsonl or .parquet file, .zst of these, or a folder"
        )
    files, unusable = find_files(path)
    names = [name_text(file.relative_to(path) if file != path else file.name) for file in files]
    recipe = SourceRecipe(kind="files")
    with TemporaryDirectory() as scratch, Progress("read documents", sum(sizes(files)), "bytes") as progress:
        bad = BadInput("skip", Path(scratch) / "bad-input.jsonl")
        for odd, why in unusable:
            bad.report("unreadable_file", name_text(odd), why)
        documents = (
            document
            for file, name in zip(files, names, strict=True)
            for document in read_file(file, name, recipe, bad, progress.update)
        )
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.encode_special_tokens = True
        for document, tokens in tokenize(documents, backend):
            yield document.id, tokens.ids


def _draw(
    documents: Iterable[tuple[str, TokenIds]], window: int, count: int, generator: np.random.Generator
) -> list[tuple[str, TokenIds]]:
    """At most `count` documents of at least `window` tokens, each equally likely (a reservoir), in order."""
    drawn: list[tuple[int, tuple[str, TokenIds]]] = []
    seen = longest = 0
    for document in documents:
        longest = max(longest, len(document[1]))
        if len(document[1]) < window:
            continue
        place = len(drawn) if len(drawn) < count else int(generator.integers(0, seen + 1))
        if place < count:
            drawn[place : place + 1] = [(seen, document)]
        seen += 1
    if not drawn:
        raise _too_short(window, longest)
    return [document for _, document in sorted(drawn, key=lambda item: item[0])]


def _too_short(window: int, longest: int) -> RefragError:
    return RefragError(
        f"no document has the {window:,} tokens of a window (context + output); the longest has {longest:,}; "
        "ask for a shorter context or output, or give longer documents"
    )
