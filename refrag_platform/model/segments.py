"""Compress anywhere (appendix A, figure 5): a prompt is an ordered list of text and chunks.

A chunk takes one decoder position, an expanded chunk its own tokens; positions run on over the compressed
sequence. `lay_out` turns prompts into the index tensors from which `RefragModel` gathers its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from refrag_platform.errors import RecipeError

PAD = -1


@dataclass(frozen=True)
class Text:
    """Tokens that the decoder reads as they are."""

    token_ids: list[int]


@dataclass(frozen=True)
class Chunks:
    """A whole passage cut into chunks, some of them kept as tokens.

    token_ids: [n, k], the last row padded with -1. keep: [n] bool, True = expanded to its tokens (default:
    none). vectors: [n, dim] from the store; None = encoded when needed. All chunks have one, kept or not, and keeping
    a chunk changes no vector: the encoder read the whole passage. relevance: how near a retriever found the passage to
    the question, None if it isn't known.
    """

    token_ids: Tensor
    keep: Tensor = field(default=None)  # type: ignore[assignment]
    vectors: Tensor | None = None
    relevance: float | None = None

    def __post_init__(self) -> None:
        if self.keep is None:
            object.__setattr__(self, "keep", torch.zeros(len(self.token_ids), dtype=torch.bool))
        if len(self.keep) != len(self.token_ids):
            raise ValueError(f"keep has {len(self.keep)} flags for {len(self.token_ids)} chunks")
        if self.vectors is not None and len(self.vectors) != len(self.token_ids):
            raise ValueError(f"{len(self.vectors)} vectors for {len(self.token_ids)} chunks")

    def kept(self, keep: Tensor) -> Chunks:
        """The same passage with other chunks expanded."""
        return replace(self, keep=keep)

    def compressed_vectors(self) -> Tensor:
        """The vectors [m, dim] of the chunks that are not kept, of a passage that has vectors."""
        assert self.vectors is not None
        folded = ~self.keep
        # Mostly all of them, which spares a copy.
        return self.vectors if bool(folded.all()) else self.vectors[folded.to(self.vectors.device)]


Prompt = Sequence[Text | Chunks]


@dataclass(frozen=True)
class Layout:
    """Where each decoder position's embedding comes from, for a batch of prompts.

    token_ids: [B, N], the token of a position, 0 where there is none. chunk_index: [B, N], the number of the chunk
    whose vector the position takes, among the compressed chunks of all `passages`; -1 where it takes a token.
    attention_mask: [B, N] bool. passages: those of all prompts that have compressed chunks, in order.
    """

    token_ids: Tensor
    chunk_index: Tensor
    attention_mask: Tensor
    passages: list[Chunks]

    @property
    def position_ids(self) -> Tensor:
        """[B, N], contiguous over each prompt's real positions."""
        return (self.attention_mask.long().cumsum(1) - 1).clamp(min=0)


def chunk_tokens(token_ids: Sequence[int], chunk_size: int) -> Tensor:
    """Cut tokens into chunks of k: [ceil(n / k), k], the last row padded with -1."""
    chunks = -(-len(token_ids) // chunk_size)
    padded = torch.full((chunks * chunk_size,), PAD, dtype=torch.long)
    padded[: len(token_ids)] = torch.as_tensor(token_ids, dtype=torch.long)
    return padded.view(chunks, chunk_size)


def cut_windows(token_ids: Tensor, most: int, padded: bool) -> tuple[Tensor, Tensor | None]:
    """Cut passages [n, L, k] into windows [m, w, k] of at most `most` chunks each.

    A longer passage is cut into as few windows as can be, all of a length but for the last, which may be some chunks
    shorter. Its own length decides, not what it is padded to.

    Returns:
        The windows, and the row [n, L] of each chunk among those of all windows; None: they stand in the same order.
    """
    n, chunks, k = token_ids.shape
    count = max(1, -(-chunks // most))
    width = most if padded else -(-chunks // count)
    if count == 1 or most == 1 or (not padded and width * count == chunks):
        return token_ids.reshape(-1, min(chunks, width), k), None
    lengths = (token_ids[..., 0] != PAD).sum(1, keepdim=True).clamp(min=1)
    counts = (lengths + most - 1) // most
    sizes = (lengths + counts - 1) // counts
    numbers = torch.arange(chunks, device=token_ids.device)
    places = numbers // sizes * width + numbers % sizes
    # Padding goes to a place past the end.
    places = torch.where(numbers < lengths, places, count * width)
    windows = token_ids.new_full((n, count * width + 1, k), PAD)
    windows = windows.scatter(1, places[..., None].expand_as(token_ids), token_ids)[:, :-1]
    rows = torch.arange(n, device=token_ids.device)[:, None] * count * width
    return windows.reshape(-1, width, k), rows + places.clamp(max=count * width - 1)


def window_numbers(chunks: int, most: int) -> Tensor:
    """The number of each chunk's window, [chunks], in a passage that `cut_windows` cuts."""
    count = -(-chunks // most)
    return torch.arange(chunks) // -(-chunks // count)


def whole_chunks(key: str, tokens: int, chunk_size: int) -> int:
    """Chunks in a context of so many tokens.

    Raises:
        RecipeError: it is not whole chunks, or none; `key` is the recipe's.
    """
    if tokens % chunk_size or not tokens:
        raise RecipeError(f"{key} is {tokens}; make it a multiple of encoder.chunk_size ({chunk_size})")
    return tokens // chunk_size


def unchunk(token_ids: Tensor) -> list[int]:
    """The tokens of chunks [n, k], padding left out."""
    return token_ids[token_ids != PAD].tolist()


def prompt_length(prompt: Prompt) -> int:
    """Decoder positions of a prompt."""
    return sum(
        len(part.token_ids)
        if isinstance(part, Text)
        else int((~part.keep).sum()) + int((part.token_ids[part.keep] != PAD).sum())
        for part in prompt
    )


def plain_tokens(prompt: Prompt) -> list[int]:
    """The prompt's tokens with every chunk expanded: what a plain decoder would read."""
    return [
        token for part in prompt for token in (part.token_ids if isinstance(part, Text) else unchunk(part.token_ids))
    ]


def compression_rate(plain_tokens: int, positions: int) -> float:
    """How many times fewer decoder positions a prompt takes than without compression; 1 where nothing is compressed.

    Everywhere the same: of whole prompts, so that question, template and history count in both.

    Args:
        plain_tokens: the prompt's with every chunk expanded (`plain_tokens`). positions: its own (`prompt_length`).
    """
    return round(plain_tokens / positions, 4) if positions else 1.0


def lay_out(prompts: Sequence[Prompt], chunk_size: int, padding_side: Literal["left", "right"] = "left") -> Layout:
    """Index tensors of a batch of prompts; shorter ones are padded on `padding_side`.

    Raises:
        ValueError: there are no prompts, one is empty, or a passage was cut with another chunk size.
    """
    rows = []
    passages: list[Chunks] = []
    compressed = 0
    for number, prompt in enumerate(prompts):
        tokens, index = [], []
        for part in prompt:
            if isinstance(part, Text):
                tokens += part.token_ids
                index += [-1] * len(part.token_ids)
                continue
            if part.token_ids.shape[1] != chunk_size:
                raise ValueError(
                    f"a passage has chunks of {part.token_ids.shape[1]} tokens; the model's k is {chunk_size}"
                )
            for row, kept in enumerate(part.keep.tolist()):
                if kept:
                    real = unchunk(part.token_ids[row])
                    tokens += real
                    index += [-1] * len(real)
                else:
                    tokens.append(0)
                    index.append(compressed)
                    compressed += 1
            if not bool(part.keep.all()):
                passages.append(part)
        if not tokens:
            raise ValueError(f"prompt {number} is empty")
        rows.append((tokens, index))
    if not rows:
        raise ValueError("no prompts to lay out")
    longest = max(len(tokens) for tokens, _ in rows)
    token_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    chunk_index = torch.full((len(rows), longest), -1, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, (tokens, index) in enumerate(rows):
        where = slice(longest - len(tokens), None) if padding_side == "left" else slice(0, len(tokens))
        token_ids[number, where] = torch.tensor(tokens)
        chunk_index[number, where] = torch.tensor(index)
        attention_mask[number, where] = True
    return Layout(token_ids, chunk_index, attention_mask, passages)


def window_layout(context: Tensor, keep: Tensor, start_token: int) -> tuple[Tensor, Tensor]:
    """Layout of equal windows in which every row keeps the same number of chunks: no padding, no loop.

    Before the context stands the token that starts a text (ours): a decoder's first position takes the attention that
    has nowhere else to go, and what a vector there says is hard to read. Prompts begin with text of their own anyway.

    Args:
        context: [B, L, k] token ids without padding. keep: [B, L] bool, the same count in every row.

    Returns:
        token_ids and chunk_index, [B, N] with N = 1 + L - T + T k for T kept chunks; chunk b, l has index b L + l.
    """
    batch, chunks, size = context.shape
    kept = int(keep[0].sum())
    if not bool((keep.sum(1) == kept).all()):
        raise ValueError("every window must keep the same number of chunks")
    # A chunk is described by k slots; a compressed one uses only the first of them.
    used = torch.ones(batch, chunks, size, dtype=torch.bool)
    used[..., 1:] = keep[..., None]
    index = torch.arange(batch * chunks).view(batch, chunks, 1).expand(-1, -1, size)
    index = torch.where(keep[..., None], -1, index)
    tokens = torch.where(keep[..., None], context, 0)
    length = chunks - kept + kept * size
    token_ids, chunk_index = tokens[used].view(batch, length), index[used].view(batch, length)
    return nn.functional.pad(token_ids, (1, 0), value=start_token), nn.functional.pad(chunk_index, (1, 0), value=-1)


def pack_slots(slots: Tensor, owners: Tensor, keep: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Layout of prompts whose kept chunks are known on the device alone: no loop, and no waiting for it.

    A prompt lies over slots: one for each token of its text, k for each chunk. A compressed chunk uses its first.

    Args:
        slots: [N, S], the token of each slot, -1 where there is none. owners: [N, S], the number of a slot's chunk, -1
            for text. keep: [N, L]. length: at least the positions of every row.

    Returns:
        token_ids and chunk_index [N, length], as `RefragModel.gather` takes them, chunk n, l at n L + l, and the
        positions of each row [N]; those after them mean nothing.
    """
    compressed = (owners >= 0) & ~keep.gather(1, owners.clamp(min=0))
    first = owners != owners.roll(1, 1)
    used = torch.where(compressed, first, slots != PAD)
    # What is not used goes to a column past the end.
    places = torch.where(used, used.long().cumsum(1) - 1, length)
    offsets = torch.arange(len(slots), device=slots.device)[:, None] * keep.shape[1]
    empty = slots.new_zeros(len(slots), length + 1)
    token_ids = empty.scatter(1, places, slots.masked_fill(compressed, 0))[:, :-1]
    index = (empty - 1).scatter(1, places, torch.where(compressed, owners + offsets, -1))[:, :-1]
    return token_ids, index, used.sum(1)
