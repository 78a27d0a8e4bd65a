"""What makes training fast on a GPU without touching the models: attention without masks, and compiled regions.

Attention is swapped through transformers' registry for the time of a call. Two things cost dearly otherwise:
a decoder given no mask looks for packed sequences (a synchronization in every forward pass; compiled, a full
mask and a slow kernel), and attention over chunks of 8 tokens wastes 15 of every 16 rows of a kernel's tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refrag_platform.model.encoder import BertEncoder, LayersEncoder
from refrag_platform.model.families import attention_window, logits_scale
from refrag_platform.model.fused import attend_chunks
from refrag_platform.training.core.packed import PackedLayout, packed_attention

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
    with attention(body.config, PACKED) if packed else _causal(body.config, inputs.shape[1]):
        states = body(inputs_embeds=inputs, use_cache=False, **layout).last_hidden_state
    scale = logits_scale(decoder.config)
    return states if scale == 1 else states * scale


def _causal(config: PretrainedConfig, positions: int) -> AbstractContextManager[None]:
    """Causal attention over so many positions without a mask."""
    window = attention_window(config)
    if window is None or positions <= window:
        return attention(config, UNPADDED)
    # The decoder's own masks know which layers have a window.
    return nullcontext()


def compile_regions(*models: nn.Module, few_shapes: bool) -> None:
    """Compile the layers of every stack in place: one graph serves a whole stack, and shapes may change.

    Args:
        few_shapes: a graph of its own for each shape; else, once a second shape is met, one for any of them.
    """
    import torch._dynamo

    # A curriculum brings several shapes, probes bring passes without gradients.
    torch._dynamo.config.recompile_limit = 64
    for module in chain.from_iterable(model.modules() for model in models):
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1:
            for layer in module:
                layer.compile(dynamic=False if few_shapes else None)


@contextmanager
def fast_kernels(*models: nn.Module, on_gpu: bool) -> Iterator[None]:
    """The fastest attention for long sequences (cuDNN's) and for an encoder's windows, while a GPU trains."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with ExitStack() as stack:
        if on_gpu:
            order = [
                SDPBackend.CUDNN_ATTENTION,
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.MATH,
            ]
            stack.enter_context(sdpa_kernel(order, set_priority=True))
            for module in chain.from_iterable(model.modules() for model in models):
                if isinstance(module, BertEncoder):
                    stack.enter_context(attention(module.backbone.config, CHUNKS))
                elif isinstance(module, LayersEncoder):
                    longest = module.window_chunks * module.chunk_size
                    stack.enter_context(_causal(module.backbone.config, longest))
        yield


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled regions as they were written."""
    with torch.compiler.set_stance("force_eager"):
        yield
