"""Token shards: flat little-endian files of ids, documents back to back, written once and memory-mapped.

Reading needs numpy alone, so that a bare GPU machine can train from a corpus folder.
"""

from __future__ import annotations

import json
from array import array
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from refrag_platform.errors import ArtifactError
from refrag_platform.files import whole

INDEX = "documents.npy"


def token_dtype(vocabulary: int) -> np.dtype:
    """The smallest unsigned type that holds every id: uint16 up to 65,536 ids, else uint32."""
    return np.dtype("<u2") if vocabulary <= 1 << 16 else np.dtype("<u4")


def shard_name(number: int) -> str:
    return f"tokens-{number:05d}.bin"


class ShardWriter:
    """Writes one split: shards of exactly `shard_tokens` tokens (the last may be shorter) and the index.

    A document may run over the end of a shard. A shard has its name only once it is whole.
    """

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.documents = 0
        self.tokens = 0
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._shard = ExitStack()  # closes the shard that is being written, if there is one, and gives it its name
        self._index = array("q")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shard.__exit__(kind, value, trace)
        if kind is None:
            index = np.frombuffer(self._index, dtype=np.int64) if self._index else np.zeros(0, np.int64)
            with whole(self._folder / INDEX) as partial, partial.open("wb") as stream:
                np.save(stream, index.astype("<i8").reshape(-1, 2))

    def add(self, ids: np.ndarray) -> tuple[int, int]:
        """Append a document; returns its shard and its first token's position there."""
        place = divmod(self.tokens, self._shard_tokens)
        self._index.extend((self.tokens, len(ids)))
        self.documents += 1
        ids = ids.astype(self._dtype)
        while len(ids):
            if self.tokens % self._shard_tokens == 0:
                self._begin_shard()
            room = self._shard_tokens - self.tokens % self._shard_tokens
            self._stream.write(ids[:room].tobytes())
            self.tokens += len(ids[:room])
            ids = ids[room:]
            if self.tokens % self._shard_tokens == 0:
                self._shard.close()
        return place

    def _begin_shard(self) -> None:
        partial = self._shard.enter_context(whole(self._folder / shard_name(self.tokens // self._shard_tokens)))
        self._stream = self._shard.enter_context(partial.open("wb"))


class Documents(NamedTuple):
    """Where documents lie in the virtual concatenation of a split's shards; int64 [documents] each."""

    start: np.ndarray
    length: np.ndarray


class TokenShards:
    """One split of a corpus, memory-mapped.

    Raises:
        ArtifactError: files are missing or shorter than the index says.
    """

    def __init__(self, content: Path, split: str) -> None:
        self._content, self._split = content, split
        folder = content / split
        try:
            facts = json.loads((content / "corpus.json").read_text(encoding="utf-8"))
            index = np.load(folder / INDEX, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{folder} is not a split of a corpus ({error}); run `refrag run corpus`") from None
        self.documents = Documents(index[:, 0], index[:, 1])
        self.total = int(index[-1].sum()) if len(index) else 0
        self._shard_tokens: int = facts["shard_tokens"]
        dtype = np.dtype(facts["dtype"]).newbyteorder("<")
        names = [folder / shard_name(number) for number in range(-(-self.total // self._shard_tokens))]
        missing = [path.name for path in names if not path.is_file()]
        if missing:
            raise ArtifactError(f"{folder} lacks {', '.join(missing)}; restore it with `dvc checkout`")
        self._shards = [np.memmap(path, dtype=dtype, mode="r") for path in names]
        held = sum(len(shard) for shard in self._shards)
        if held != self.total:
            raise ArtifactError(f"{folder} holds {held} tokens, its index says {self.total}; run `refrag run corpus`")

    def __reduce__(self) -> tuple[type[TokenShards], tuple[Path, str]]:
        # Worker processes map the files anew; pickled memory maps would be copied.
        return TokenShards, (self._content, self._split)

    def __len__(self) -> int:
        return len(self.documents.start)

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Ids [length] as int64 from position `start` of the virtual concatenation.

        Raises:
            IndexError: the range is not inside the split.
        """
        if start < 0 or length < 0 or start + length > self.total:
            raise IndexError(f"tokens [{start}, {start + length}) of {self._split}, which has {self.total}")
        out = np.empty(length, dtype=np.int64)
        done = 0
        while done < length:
            shard, offset = divmod(start + done, self._shard_tokens)
            piece = self._shards[shard][offset : offset + length - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Ids [len(starts), length] as int64, a row from each of `starts`: as `tokens`, many at once.

        Raises:
            IndexError: a window is not inside the split.
        """
        if len(starts) and (length < 0 or starts.min() < 0 or starts.max() + length > self.total):
            raise IndexError(f"windows of {length} tokens of {self._split}, which has {self.total}")
        out = np.empty((len(starts), length), dtype=np.int64)
        shards, offsets = np.divmod(starts, self._shard_tokens)
        whole = offsets + length <= self._shard_tokens
        for number in np.unique(shards[whole]):
            rows = whole & (shards == number)
            out[rows] = self._shards[number][offsets[rows, None] + np.arange(length)]
        # Few: only those that run over the end of a shard.
        for row in np.flatnonzero(~whole):
            out[row] = self.tokens(int(starts[row]), length)
        return out

    def document(self, number: int) -> np.ndarray:
        """Ids of one document, int64."""
        return self.tokens(int(self.documents.start[number]), int(self.documents.length[number]))
