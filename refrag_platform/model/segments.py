"""Compress anywhere (appendix A, figure 5): a prompt is an ordered list of text and chunks.

A chunk takes one decoder position, an expanded chunk its own tokens; positions run on over the compressed
sequence. `lay_out` turns prompts into the index tensors from which `RefragModel` gathers its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

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

    def at_rate(self, rate: int) -> Chunks:
        """This passage, none of whose chunks is kept, in chunks of `rate` times as many tokens, its vectors pooled."""
        if rate == 1:
            return self
        k, missing = self.token_ids.shape[1], -len(self.token_ids) % rate
        token_ids = nn.functional.pad(self.token_ids, (0, 0, 0, missing), value=PAD)
        vectors = self.vectors
        if vectors is not None:
            vectors = pool_vectors(nn.functional.pad(vectors, (0, 0, 0, missing)), token_ids[:, 0] != PAD, rate)
        return Chunks(token_ids.view(-1, rate * k), vectors=vectors, relevance=self.relevance)

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


def pool_vectors(vectors: Tensor, real: Tensor, rate: int) -> Tensor:
    """The mean of every `rate` neighbouring vectors [..., n rate, dim], of those that are `real` [..., n rate] alone.

    Returns:
        [..., n, dim]; zeros where none is real.
    """
    if rate == 1:
        return vectors
    weights = real.to(vectors.device).unflatten(-1, (-1, rate))[..., None].float()
    sums = (vectors.unflatten(-2, (-1, rate)) * weights).sum(-2)
    return (sums / weights.sum(-2).clamp(min=1)).to(vectors.dtype)


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


def lay_slots(
    prompts: Sequence[Prompt], chunk_size: int, least_chunks: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts over slots, one for each token of text and k for each chunk, as `pack_slots` reads them.

    Args: least_chunks: L at least, where no prompt has more chunks.

    Returns:
        slots [N, S], the token of each, -1 where there is none; owners [N, S], the number of a slot's chunk in its
        prompt, -1 for text; chunks [N, L, k], -1 where there is none; keep [N, L] bool.

    Raises:
        ValueError: there are no prompts, one is empty, or a passage was cut with another chunk size.
    """
    if not prompts:
        raise ValueError("no prompts to lay out")
    slots, owners = [], []
    # The first row sets the least L and is left out again.
    chunks = [torch.full((least_chunks, chunk_size), PAD)]
    keep = [torch.zeros(least_chunks, dtype=torch.bool)]
    for number, prompt in enumerate(prompts):
        passages = [part for part in prompt if isinstance(part, Chunks)]
        for size in (passage.token_ids.shape[1] for passage in passages):
            if size != chunk_size:
                raise ValueError(f"a passage has chunks of {size} tokens; the model's k is {chunk_size}")
        if not any(len(part.token_ids) for part in prompt):
            raise ValueError(f"prompt {number} is empty")
        tokens = [torch.as_tensor(part.token_ids, dtype=torch.long).flatten() for part in prompt]
        of_chunks = torch.tensor([isinstance(part, Chunks) for part in prompt])
        in_chunk = of_chunks.repeat_interleave(torch.tensor([*map(len, tokens)]))
        slots.append(torch.cat(tokens))
        owners.append(torch.where(in_chunk, (in_chunk.cumsum(0) - 1) // chunk_size, -1))
        chunks.append(slots[-1][in_chunk].view(-1, chunk_size))
        keep.append(torch.cat([keep[0][:0], *(passage.keep.cpu() for passage in passages)]))
    padded = partial(pad_sequence, batch_first=True, padding_value=PAD)
    return padded(slots), padded(owners), padded(chunks)[1:], pad_sequence(keep, batch_first=True)[1:]


def pack_slots(slots: Tensor, owners: Tensor, keep: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Layout of prompts whose kept chunks are known on the device alone: no loop, and no waiting for it.

    Of its slots a compressed chunk uses the first, and all else those that hold a token.

    Args: slots, owners: [N, S], keep: [N, L], as `lay_slots` has them. length: at least the positions of every row.

    Returns:
        token_ids and chunk_index [N, length], as `RefragModel.gather` takes them, chunk n, l at n L + l, and the
        positions of each row [N]; those after them mean nothing.
    """
    compressed = (owners >= 0) & ~keep.gather(1, owners.clamp(min=0))
    first = owners != nn.functional.pad(owners, (1, -1), value=-1)
    used = torch.where(compressed, first, slots != PAD)
    # What is not used goes to a column past the end.
    places = torch.where(used, used.long().cumsum(1) - 1, length)
    offsets = torch.arange(len(slots), device=slots.device)[:, None] * keep.shape[1]
    empty = slots.new_zeros(len(slots), length + 1)
    token_ids = empty.scatter(1, places, slots.masked_fill(compressed, 0))[:, :-1]
    index = (empty - 1).scatter(1, places, torch.where(compressed, owners + offsets, -1))[:, :-1]
    return token_ids, index, used.sum(1)


def lay_out(prompts: Sequence[Prompt], chunk_size: int, padding_side: Literal["left", "right"] = "left") -> Layout:
    """Index tensors of a batch of prompts; shorter ones are padded on `padding_side`.

    Raises:
        ValueError: as `lay_slots`.
    """
    slots, owners, chunks, keep = lay_slots(prompts, chunk_size)
    token_ids, index, positions = pack_slots(slots, owners, keep, slots.shape[1])
    compressed = ~keep & (chunks[..., 0] != PAD)
    numbers = compressed.flatten().cumsum(0) - 1
    index = torch.where(index >= 0, numbers[index.clamp(min=0)], -1)
    # Of each position the place in its packed row, whose padding is on the right.
    longest = int(positions.max())
    shifts = positions if padding_side == "left" else torch.zeros_like(positions)
    places = (torch.arange(longest) + shifts[:, None]) % longest
    passages = [part for prompt in prompts for part in prompt if isinstance(part, Chunks) and not bool(part.keep.all())]
    return Layout(token_ids.gather(1, places), index.gather(1, places), places < positions[:, None], passages)


def window_layout(context: Tensor, keep: Tensor, start_token: int) -> tuple[Tensor, Tensor]:
    """Layout of equal windows in which every row keeps the same number of chunks: no padding, no loop.

    Before the context stands the token that starts a text (ours): a decoder's first position takes the attention that
    has nowhere else to go, and what a vector there says is hard to read. Prompts begin with text of their own anyway.

    Args:
        context: [B, L, k] token ids without padding. keep: [B, L] bool, the same count in every row.

    Returns:
        token_ids and chunk_index, [B, N] with N = 1 + L - T + T k for T kept chunks; chunk b, l has index b L + l.
    """
    _, chunks, size = context.shape
    kept = int(keep[0].sum())
    if not bool((keep.sum(1) == kept).all()):
        raise ValueError("every window must keep the same number of chunks")
    slots = nn.functional.pad(context.flatten(1), (1, 0), value=start_token)
    owners = nn.functional.pad(torch.arange(chunks).repeat_interleave(size), (1, 0), value=-1).expand_as(slots)
    token_ids, index, _ = pack_slots(slots, owners, keep, 1 + chunks - kept + kept * size)
    return token_ids, index
