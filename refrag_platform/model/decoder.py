"""The decoder run where nothing is padded: its hidden states, what they predict, and attention without masks.

Attention is swapped through transformers' registry for the time of a call. Two things cost dearly otherwise:
a decoder given no mask looks for packed sequences (a synchronization in every forward pass; compiled, a full
mask and a slow kernel), and attention over chunks of 8 tokens wastes 15 of every 16 rows of a kernel's tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refrag_platform.model.families import attention_window, logits_scale
from refrag_platform.model.fused import attend_chunks
from refrag_platform.model.packed import PackedLayout, packed_attention

# Of hidden states whose logits are held at once.
ROWS = 4096
M = TypeVar("M", bound=nn.Module)
UNPADDED = "refrag_unpadded"
PACKED = "refrag_packed"
CHUNKS = "refrag_chunks"
# Of chunks none of which is padded. transformers leaves a mask of nothing out, but not while a CUDA graph is captured:
# without a mask function by this name none is ever made.
UNPADDED_CHUNKS = "refrag_unpadded_chunks"


def unpadded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """sdpa with no mask but one for each pair of tokens.

    That no mask function is registered for it spares the search for packed sequences.
    """
    pairs = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None
    return sdpa_attention_forward(module, query, key, value, pairs, **kwargs)


def chunk_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within many short sequences [n, heads, k, size], many of them as one, if none is padded.

    Attention's dropout is left out.
    """
    if attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attend_chunks(query, key, value, scaling), None


def register() -> None:
    """Make all known to transformers; doing it again changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(UNPADDED, unpadded_attention)
    ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
    ALL_ATTENTION_FUNCTIONS.register(CHUNKS, chunk_attention)
    ALL_ATTENTION_FUNCTIONS.register(UNPADDED_CHUNKS, chunk_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(CHUNKS, sdpa_mask)


@contextmanager
def attention(config: PretrainedConfig, name: str) -> Iterator[None]:
    """Use a registered attention while the context lasts; only where the model uses sdpa by itself."""
    before: str = config._attn_implementation
    if before != "sdpa":
        yield
        return
    register()
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def decoder_states(decoder: PreTrainedModel, inputs: Tensor, packed: PackedLayout | None = None) -> Tensor:
    """Last hidden states [B, N, d] of inputs [B, N, d] without padding, every position after those before it.

    Scaled as the family scales its logits: their product with the head's weight is what the decoder predicts.
    Under autocast the residual stream is kept in the lower precision too, as in a model loaded in it.

    Args: packed: how the inputs are read if they are many windows in one.
    """
    if torch.is_autocast_enabled(inputs.device.type):
        inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
    body = decoder.get_decoder()
    layout: dict[str, Tensor] = {}
    if packed:
        heads = body.config.num_attention_heads
        groups = getattr(body.config, "num_key_value_heads", None) or heads
        layout["attention_mask"] = packed.attention_mask(groups, heads // groups)
        layout["position_ids"] = packed.position_ids
    with attention(body.config, PACKED) if packed else causal(body.config, inputs.shape[1]):
        states = body(inputs_embeds=inputs, use_cache=False, **layout).last_hidden_state
    scale = logits_scale(decoder.config)
    return states if scale == 1 else states * scale


def causal(config: PretrainedConfig, positions: int) -> AbstractContextManager[None]:
    """Causal attention over so many positions without a mask."""
    window = attention_window(config)
    if window is None or positions <= window:
        return attention(config, UNPADDED)
    # The decoder's own masks know which layers have a window.
    return nullcontext()


def head_weight(decoder: PreTrainedModel) -> Tensor:
    """The weight [vocabulary, width] of the decoder's output head."""
    return cast(nn.Linear, decoder.get_output_embeddings()).weight


def in_dtype(module: M, dtype: torch.dtype) -> M:
    """`module` itself, its numbers in `dtype` but for the frequencies of rotary embeddings.

    Rounded to bfloat16 these would turn far positions by other angles than in training; transformers keeps them, too.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not name.endswith("inv_freq"):
            tensor.data = tensor.data.to(dtype)
    return module


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label in nats, [n] float32, block by block and without gradients.

    In float32 whatever autocast says: bfloat16 logits round by up to 0.06 nats, more than a policy's gain.
    """
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        exact = weight.float()
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            logits = hidden[rows].float() @ exact.t()
            parts.append(logits.logsumexp(-1) - logits.gather(1, labels[rows, None])[:, 0])
    return torch.cat(parts)
