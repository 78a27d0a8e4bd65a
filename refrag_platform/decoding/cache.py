"""The key-value cache with slots, and the attention that reads and writes it inside an unmodified decoder.

transformers lets an attention function be registered by name and hands it whatever keywords the decoder is called
with; so a decoder of any Llama type keeps its own code, and its own mask and cache classes stay out of the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

from refrag_platform.errors import RefragError
from refrag_platform.model.families import within_window

ATTENTION = "refrag_slots"
# Attention of other families that this one doesn't compute.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")

# Queries of one row up to which their scores are written out: a short question after a long kept beginning.
FEW = 64


class SlotCache:
    """Keys and values of up to `slots` sequences of up to `positions` positions each.

    layers: keys and values of each layer, [slots, kv_heads, positions + 1, head_dim]. A slot's last cell, `spare`,
    takes what padding writes and is never read. zeroed: padded steps read and mask what was never written, which must
    be numbers; without them memory is taken as positions are first used.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        slots: int,
        positions: int,
        dtype: torch.dtype,
        device: torch.device,
        zeroed: bool,
    ) -> None:
        heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.slots, self.positions, self.zeroed = slots, positions, zeroed
        self.spare = positions
        shape = (slots, self.kv_heads, positions + 1, self.head_dim)
        # Storages of their own: the compiler copies mutated arguments that share one.
        allocate = torch.zeros if zeroed else torch.empty
        self.layers = [
            (allocate(shape, dtype=dtype, device=device), allocate(shape, dtype=dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]

    @property
    def bytes_per_position(self) -> int:
        """Bytes of keys and values that one position of one sequence takes."""
        return 2 * len(self.layers) * self.kv_heads * self.head_dim * self.layers[0][0].element_size()

    def read(self, slot: int, begin: int, end: int) -> Tensor:
        """A copy of a slot's positions, [layers, 2, kv_heads, end - begin, head_dim]."""
        return torch.stack([torch.stack([part[slot, :, begin:end] for part in layer]) for layer in self.layers])

    def write(self, slot: int, begin: int, states: Tensor) -> None:
        """Put what `read` returned (of any slot) into a slot from position `begin` on."""
        for layer, saved in zip(self.layers, states, strict=True):
            for part, state in zip(layer, saved, strict=True):
                part[slot, :, begin : begin + state.shape[1]] = state

    def clear(self, slot: int) -> None:
        """Zeros where steps are padded: NaN would show through their masks. Others read just what they wrote."""
        if not self.zeroed:
            return
        for layer in self.layers:
            for part in layer:
                part[slot] = 0

    def copy(self, source: int, target: int, positions: int) -> None:
        """The first positions of one slot into another."""
        for layer in self.layers:
            for part in layer:
                part[target, :, :positions] = part[source, :, :positions]


@dataclass(frozen=True)
class Step:
    """Where one call of the decoder writes its keys and values and what each query reads.

    slots, positions: [B, N], the cell that each new key takes. What is read is one of
    spans: a (slot, end) per row, exact and without padding: queries are the last N of the slot's first `end`;
    nothing: an empty slot's prefill, causal among the new positions;
    mask [N, K] with slot [1]: a prefill that goes on in a slot, query n reads key k where True;
    mask [B, 1, K] without slot: one query per row, row b reads slot b.
    """

    slots: Tensor
    positions: Tensor
    spans: tuple[tuple[int, int], ...] | None = None
    mask: Tensor | None = None
    slot: Tensor | None = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    step: Step,
    slot_cache: tuple[Tensor, Tensor],
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer in the form that transformers asks for: query [B, H, N, D] -> [B, N, H, D].

    Keys and values keep their own number of heads; queries that share one are computed together.

    Args: sliding_window: positions that a query reads, the last ones, its own among them; None: all.

    Raises:
        RefragError: the decoder's attention has a soft cap, sinks or position bias.
    """
    for name in UNSUPPORTED:
        if other.get(name) is not None:
            raise RefragError(
                f"{type(module).__name__} attends with {name}, which the decoding engine does not compute"
            )
    keys, values = slot_cache
    keys[step.slots, :, step.positions] = key.transpose(1, 2)
    values[step.slots, :, step.positions] = value.transpose(1, 2)
    if step.spans is not None:
        rows = [
            _exact(query[row, None], keys[slot, None, :, :end], values[slot, None, :, :end], scaling, sliding_window)
            for row, (slot, end) in enumerate(step.spans)
        ]
        result = rows[0] if len(rows) == 1 else torch.cat(rows)
    elif step.mask is None:
        result = _exact(query, key, value, scaling, sliding_window)
    elif step.slot is not None:
        reach = step.mask.shape[-1]
        pair = keys[:, :, :reach], values[:, :, :reach]
        if len(keys) > 1:
            # A copy: which slot it is, the graph can't know.
            pair = pair[0].index_select(0, step.slot), pair[1].index_select(0, step.slot)
        masked = _few if query.shape[2] <= FEW else _masked
        result = masked(query, *pair, _near(step.mask, sliding_window), scaling)
    else:
        batch, reach = query.shape[0], step.mask.shape[-1]
        mask = _near(step.mask, sliding_window)
        result = _few(query, keys[:batch, :, :reach], values[:batch, :, :reach], mask, scaling)
    return result.transpose(1, 2).contiguous(), None


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """As many queries as keys: the flash kernel's own case."""
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def _near(mask: Tensor, window: int | None) -> Tensor:
    return mask if window is None or mask.shape[-1] <= window else within_window(mask, window)


def _exact(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """The queries are the last of the keys' positions; nothing is padded."""
    if window is not None:
        # No query reads what lies further back.
        first = max(0, key.shape[2] - query.shape[2] + 1 - window)
        key, value = key[:, :, first:], value[:, :, first:]
    new, reach = query.shape[2], key.shape[2]
    if new == reach > 1 and (window is None or reach <= window):
        return _causal(query, key, value, scaling)
    if new == 1:
        grouped = query.reshape(1, key.shape[1], -1, query.shape[-1])
        return scaled_dot_product_attention(grouped, key, value, scale=scaling).reshape(query.shape)
    mask = torch.ones(new, reach, dtype=torch.bool, device=query.device).tril(reach - new)
    return _masked(query, key, value, _near(mask, window), scaling)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Queries [1, H, N, D] under a mask [N, K]: those of one key head are stacked, so that no key is repeated."""
    groups = query.shape[1] // key.shape[1]
    stacked = query.reshape(1, key.shape[1], -1, query.shape[-1])
    return scaled_dot_product_attention(stacked, key, value, attn_mask=mask.repeat(groups, 1), scale=scaling).reshape(
        query.shape
    )


def _few(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Few queries per row, [B, H, N, D], under a mask [N, K] or [B, 1, K], as two matrix products: they spread the
    keys of a long row over the whole device, which the fused kernels don't."""
    groups = query.shape[1] // key.shape[1]
    stacked = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
    mask = mask[:, None] if mask.dim() == 3 else mask.repeat(groups, 1)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = (stacked * scale) @ key.transpose(2, 3)
    shares = scores.float().masked_fill(~mask, float("-inf")).softmax(-1).to(value.dtype)
    return (shares @ value).reshape(query.shape)


AttentionInterface.register(ATTENTION, attend)
