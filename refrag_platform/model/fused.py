"""The layers of a BERT-type encoder for windows without padding, in as few passes over memory as can be.

    fused = FusedLayers(encoder)
    vectors = encoder(token_ids, padded=False, layers=fused)

Three things are saved against the layers as transformers writes them: query, key and value are one product; GELU is
applied where the product is still at hand (CUDA, bfloat16); and where the first position alone is pooled, the
last layer computes no other. Only for inference: nothing here has a gradient of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from refrag_platform.errors import RefragError
from refrag_platform.model.encoder import ChunkEncoder

# Backbones whose layers are BERT's, by their config's model_type.
TYPES = ("bert", "roberta", "xlm-roberta", "camembert")
# Rows of an attention kernel's tile: as many chunks as fit go through it together.
TILE = 128


def attend_chunks(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """Attention within many short sequences [n, heads, k, size] -> [n, k, heads, size].

    TILE / k sequences go through the kernel as one with a block-diagonal mask; by itself it would leave most of its
    tile empty.
    """
    n, heads, k, size = query.shape
    group = max(TILE // k, 1)
    if n % group:
        group = 1

    def together(states: Tensor) -> Tensor:
        return states.transpose(1, 2).reshape(n // group, group * k, heads, size).transpose(1, 2)

    mask = None
    if group > 1:
        chunk = torch.arange(group * k, device=query.device) // k
        mask = chunk[:, None] == chunk[None, :]
    states = scaled_dot_product_attention(
        together(query), together(key), together(value), attn_mask=mask, scale=scaling
    )
    return states.transpose(1, 2).reshape(n, k, heads, size)


@torch.library.custom_op("refrag::linear_gelu", mutates_args=())
def linear_gelu(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(states weight' + bias) for states [..., in], weight [out, in]; an operator, so that the compiler keeps it.

    In bfloat16 on CUDA one kernel does both, with GELU's tanh form: it differs from the exact one by less than 0.0005,
    less than bfloat16 tells apart from 0.13 on.
    """
    if states.is_cuda and states.dtype == torch.bfloat16:
        flat = torch._addmm_activation(bias, states.flatten(0, -2), weight.t(), use_gelu=True)
        return flat.view(*states.shape[:-1], len(weight))
    return gelu(linear(states, weight, bias))


@linear_gelu.register_fake
def _(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return states.new_empty(*states.shape[:-1], len(weight))


class FusedLayers:
    """The layers of an encoder's backbone, ready to run: embedded windows [n, T, h] to states [n, T, h].

    [n, 1, h] where the encoder pools the first position alone. Query, key and value are copied; all other weights are
    the encoder's own. Its weights must not change afterwards.
    """

    def __init__(self, encoder: ChunkEncoder, compile: bool = False) -> None:
        """Args: compile: fuse what is left of each layer with torch.compile.

        Raises:
            RefragError: the backbone is of no BERT type, or its activation is not GELU.
        """
        config = encoder.backbone.config
        if config.model_type not in TYPES or config.hidden_act != "gelu" or config.is_decoder:
            raise RefragError(
                f"the layers of an encoder of type {config.model_type} can't be fused; run it as it is: only encoders "
                f"of type {', '.join(TYPES)} with gelu can be"
            )
        self._embeddings = cast(nn.Module, encoder.backbone.embeddings)
        self._layers = [_Layer.of(layer) for layer in cast(Any, encoder.backbone).encoder.layer]
        self._first = encoder.pooling == "cls"
        self._run = torch.compile(_run, fullgraph=True, dynamic=False) if compile else _run

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        states = self._embeddings(inputs_embeds=inputs)
        for layer in self._layers[:-1]:
            states = self._run(layer, states, False)
        return self._run(self._layers[-1], states, self._first)


@dataclass(frozen=True)
class _Layer:
    """What one layer multiplies and adds: (weight, bias) pairs."""

    heads: int
    query_key_value: tuple[Tensor, Tensor]
    attended: tuple[Tensor, Tensor]
    attention_norm: nn.LayerNorm
    inner: tuple[Tensor, Tensor]
    outer: tuple[Tensor, Tensor]
    output_norm: nn.LayerNorm

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention = layer.attention.self
        parts = (attention.query, attention.key, attention.value)
        merged = torch.cat([part.weight for part in parts]).detach(), torch.cat([part.bias for part in parts]).detach()
        return cls(
            attention.num_attention_heads,
            merged,
            _pair(layer.attention.output.dense),
            layer.attention.output.LayerNorm,
            _pair(layer.intermediate.dense),
            _pair(layer.output.dense),
            layer.output.LayerNorm,
        )


def _run(layer: _Layer, states: Tensor, first: bool) -> Tensor:
    """One layer on states [n, k, h]; with `first`, its output at the first position alone, [n, 1, h]."""
    n, k, width = states.shape
    parts = linear(states, *layer.query_key_value).view(n, k, 3, layer.heads, width // layer.heads)
    query, key, value = parts.transpose(1, 3).unbind(2)
    if first:
        # One query each: no product of matrices would be full.
        scores = (query[:, :, :1] * key).sum(-1, dtype=torch.float32) * query.shape[-1] ** -0.5
        states, attended = states[:, :1], (scores.softmax(-1).to(value.dtype)[..., None] * value).sum(2)
    else:
        attended = attend_chunks(query, key, value)
    states = _normed(linear(attended.reshape(states.shape), *layer.attended) + states, layer.attention_norm)
    return _normed(linear(linear_gelu(states, *layer.inner), *layer.outer) + states, layer.output_norm)


def _normed(states: Tensor, norm: nn.LayerNorm) -> Tensor:
    return layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _pair(dense: nn.Linear) -> tuple[Tensor, Tensor]:
    return dense.weight.detach(), dense.bias.detach()
