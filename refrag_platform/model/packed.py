"""Many windows in one sequence: the o tokens after every o tokens of a text, predicted from the chunks before.

[start, e_1 .. e_L, x_(o+1) .. x_(s+o)]: all chunk vectors of a context of s tokens first, then its text from the second
block of o tokens to one block past the end. A block reads the vectors of what lies before it and its own tokens, at
the positions that it has in a window of its own: the losses are those of s / o windows, whose contexts grow from o to
s tokens. A text is encoded once and its vectors are read once for all of them, and every predicted token is near the
context, where vectors matter most.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from refrag_platform.model.families import within_window


class PackedLayout(NamedTuple):
    """How a packed sequence of P context positions and n blocks of o tokens is read.

    mask: [B or 1, n, o, P + o] bool, what a block's tokens see of the context and of their own block. position_ids:
    [B or 1, P + n o]. last: [B or 1, n], the context position that predicts a block's first token.
    """

    mask: Tensor
    position_ids: Tensor
    last: Tensor

    def attention_mask(self, groups: int, shared: int) -> Tensor:
        """The mask as `packed_attention` wants it, once for all layers: [B or 1, n groups, shared o, P + o].

        Args: groups: heads of keys. shared: heads of queries that share one.
        """
        rows, blocks, block, keys = self.mask.shape
        spread = self.mask[:, :, None, None].expand(-1, -1, groups, shared, -1, -1)
        return spread.reshape(rows, blocks * groups, shared * block, keys)


def known_positions(keep: Tensor, chunk_size: int, block_chunks: int) -> Tensor:
    """Context positions [B, n] that lie before each block, for chunks [B, L] of which some are kept as k tokens.

    The token that starts the sequence is one of them.

    Args: block_chunks: chunks in as many tokens as a block has, o / k.
    """
    ends = torch.where(keep, chunk_size, 1).cumsum(1)
    return 1 + ends[:, block_chunks - 1 :: block_chunks]


def packed_layout(known: Tensor, context_positions: int, block: int) -> PackedLayout:
    """The layout for `known` context positions before each block [B or 1, n], of P in all, and `block` tokens each."""
    rows, blocks = known.shape
    seen = torch.arange(context_positions, device=known.device) < known[..., None, None]
    causal = torch.ones(block, block, dtype=torch.bool, device=known.device).tril()
    mask = torch.cat(
        [seen.expand(rows, blocks, block, context_positions), causal.expand(rows, blocks, block, block)], -1
    )
    context = torch.arange(context_positions, device=known.device).expand(rows, -1)
    text = known[..., None] + torch.arange(block, device=known.device)
    return PackedLayout(mask, torch.cat([context, text.flatten(1)], 1), known - 1)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed sequence, queries [B, heads, P + n o, size]; `PackedLayout.attention_mask` says P, n and o.

    The context is plain causal attention. A block's queries meet the context's keys and its own, P + o of them, not the
    other blocks'. Each block has its own copy of the context's keys and values, n (P + o) a head in all. The heads that
    share keys go through as further rows of one head. Attention's dropout is left out.
    """
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    shared = heads // groups
    blocks, block = attention_mask.shape[1] // groups, attention_mask.shape[2] // shared
    context = attention_mask.shape[3] - block
    attend = nn.functional.scaled_dot_product_attention
    near = None
    if sliding_window is not None and sliding_window < context + block:
        attention_mask = within_window(attention_mask, sliding_window)
        near = within_window(torch.ones(context, context, dtype=torch.bool, device=query.device).tril(), sliding_window)
    first = attend(
        query[:, :, :context], key[:, :, :context], value[:, :, :context],
        attn_mask=near, is_causal=near is None, scale=scaling, enable_gqa=shared > 1,
    )  # fmt: skip

    def with_context(states: Tensor) -> Tensor:
        block_states = states[:, :, context:].unflatten(2, (blocks, block)).transpose(1, 2)
        before = states[:, None, :, :context].expand(-1, blocks, -1, -1, -1)
        return torch.cat([before, block_states], 3).flatten(1, 2)

    rows = query[:, :, context:].view(batch, groups, shared, blocks, block, size).permute(0, 3, 1, 2, 4, 5)
    rest = attend(
        rows.reshape(batch, blocks * groups, shared * block, size),
        with_context(key),
        with_context(value),
        attn_mask=attention_mask,
        scale=scaling,
    )
    rest = rest.view(batch, blocks, groups, shared, block, size).permute(0, 1, 4, 2, 3, 5)
    return torch.cat([first.transpose(1, 2), rest.reshape(batch, blocks * block, heads, size)], 1), None


def predicting_states(hidden: Tensor, layout: PackedLayout) -> Tensor:
    """Those of the sequence's hidden states [B, P + n o, d] that predict the blocks' tokens in order, [B n o, d]."""
    blocks, block, keys = layout.mask.shape[1:]
    context = keys - block
    last = layout.last.expand(len(hidden), -1)[..., None].expand(-1, -1, hidden.shape[-1])
    text = hidden[:, context:].unflatten(1, (blocks, block))
    return torch.cat([hidden.gather(1, last)[:, :, None], text[:, :, :-1]], 2).flatten(0, 2)
