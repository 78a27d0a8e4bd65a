"""CEPE's shape (arXiv 2402.16617) with random weights: what else a light encoder could be used for.

The same encoder reads the context in long chunks; every decoder layer attends across to *all* of its token states,
between self-attention and MLP. The decoder itself reads the question alone. Quality is not looked at, only the work.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refrag_platform.bench.arithmetic import DecoderSize, Work, encoder_attention, encoder_weights, linear_weights
from refrag_platform.model.encoder import ChunkEncoder, WindowLayout

# Tokens that the encoder reads together.
CHUNK = 256


class CrossAttention(nn.Module):
    """What a decoder layer has in place of its MLP: attention to the context, then the MLP.

    keys, values: [kv heads, s, head size], the context as this layer sees it, kept for all further tokens.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: Any, size: DecoderSize, head_dim: int, encoder_width: int, context: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.RMSNorm(size.width)
        self.query = nn.Linear(size.width, size.attention_width, bias=False)
        self.key = nn.Linear(encoder_width, size.kv_width, bias=False)
        self.value = nn.Linear(encoder_width, size.kv_width, bias=False)
        self.output = nn.Linear(size.attention_width, size.width, bias=False)
        self.mlp_norm, self.mlp = layer.post_attention_layernorm, layer.mlp
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(size.kv_width // head_dim, context, head_dim))

    def read(self, states: Tensor) -> None:
        """Take in the encoder's states [s, e]."""
        for kept, project in ((self.keys, self.key), (self.values, self.value)):
            kept.copy_(project(states).unflatten(1, (-1, self.head_dim)).transpose(0, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        """What is added to the residual stream [1, q, d]. Two matrix products: few queries read many keys."""
        _, length, _ = hidden.shape
        query = self.query(self.norm(hidden)).view(length, self.keys.shape[0], -1, self.head_dim)
        query = query.permute(1, 2, 0, 3).flatten(1, 2) * self.head_dim**-0.5
        shares = (query @ self.keys.transpose(1, 2)).float().softmax(-1).to(hidden.dtype)
        attended = (shares @ self.values).unflatten(1, (-1, length)).permute(2, 0, 1, 3).reshape(1, length, -1)
        crossed = self.output(attended)
        return crossed + self.mlp(self.mlp_norm(hidden + crossed))


class Cepe:
    """`decoder`, with a CrossAttention in every layer, reads the question once `read` has taken in the context.

    Args:
        decoder: stays as it is; the weights are shared.
        context: s, in tokens.
    """

    def __init__(self, decoder: PreTrainedModel, encoder: ChunkEncoder, context: int) -> None:
        self.encoder, self.size = encoder, DecoderSize.of(decoder)
        self.width: int = encoder.backbone.config.hidden_size
        # RoBERTa leaves two of its positions out.
        self.chunk = min(CHUNK, context, encoder.backbone.config.max_position_embeddings - 2)
        self.context = context
        shared = {id(tensor): tensor for tensor in chain(decoder.parameters(), decoder.buffers())}
        self.decoder: Any = copy.deepcopy(decoder, shared)
        self.cross: list[CrossAttention] = []
        head_dim = self.size.attention_width // decoder.config.num_attention_heads
        for layer in self.decoder.get_decoder().layers:
            with decoder.device:
                cross = CrossAttention(layer, self.size, head_dim, self.width, context).to(decoder.dtype)
            layer.post_attention_layernorm, layer.mlp = nn.Identity(), cross
            self.cross.append(cross)

    def encode(self, token_ids: Tensor) -> Tensor:
        """States [s, e] of context tokens [s], read in chunks."""
        whole = self.context // self.chunk * self.chunk
        states = []
        for ids in (token_ids[:whole].view(-1, self.chunk), token_ids[whole:].view(1, -1)):
            if ids.numel():
                embeddings = nn.functional.embedding(ids, self.encoder.decoder_embeddings)
                states.append(self.encoder.states(ids, embeddings, WindowLayout()).flatten(0, 1))
        return torch.cat(states)

    def read(self, states: Tensor) -> None:
        """Every layer's keys and values of the context's states [s, e]."""
        for cross in self.cross:
            cross.read(states)

    def kv_bytes(self, question: int) -> int:
        """Kept for further tokens: the question's keys and values, and every layer's of all context tokens."""
        return self.size.kv_bytes(question + self.context)

    def prefill_work(self, question: int) -> Work:
        """Question after context, the encoder's states at hand."""
        cross, layers, size = self.cross[0], self.size.layers, self.size
        asking = layers * (linear_weights(cross.query) + linear_weights(cross.output))
        reading = layers * (linear_weights(cross.key) + linear_weights(cross.value))
        attention = 4.0 * layers * size.attention_width * self.context * question
        flops = 2.0 * (asking * question + reading * self.context) + attention
        # Keys and values are written, then read.
        moved = (asking + reading) * size.number_bytes + 2 * size.kv_bytes(self.context)
        return size.prefill(question) + Work(flops, moved)

    def encode_work(self) -> Work:
        """Context tokens to the encoder's states."""
        weights, _ = encoder_weights(self.encoder)
        attention = encoder_attention(self.encoder, self.context, self.chunk)
        return Work(2.0 * weights * self.context + attention, weights * self.size.number_bytes)

    def step_work(self, question: int) -> Work:
        """One token more."""
        cross, size = self.cross[0], self.size
        asking = size.layers * (linear_weights(cross.query) + linear_weights(cross.output))
        attention = 4.0 * size.layers * size.attention_width * self.context
        across = Work(2.0 * asking + attention, asking * size.number_bytes + size.kv_bytes(self.context))
        return size.step(question) + across
