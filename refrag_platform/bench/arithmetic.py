"""What a request must cost: the paper's formulas (appendix A) and the machine's arithmetic limits.

Nothing here runs a model; times are in seconds, sizes in bytes, rates in FLOP/s and bytes/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from refrag_platform.model.backbone import embedding_weight
from refrag_platform.model.encoder import ChunkEncoder
from refrag_platform.model.refrag import RefragModel


def linear_weights(module: nn.Module) -> int:
    """Weights of all matrix products in a module."""
    return sum(child.weight.numel() for child in module.modules() if isinstance(child, nn.Linear))


@dataclass(frozen=True)
class Work:
    """What must be done at least: floating-point operations, and bytes through memory."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, peak: float, bandwidth: float) -> float:
        """The arithmetic limit: the longer of the two, as if they overlapped perfectly."""
        return max(self.flops / peak, self.bytes / bandwidth)


@dataclass(frozen=True)
class DecoderSize:
    """A decoder's dimensions.

    width: d. layers: l. parameters: n. body: weights of the layers' matrix products. head: of the output
    embeddings. attention_width, kv_width: heads and key-value heads times their size. number_bytes: of a weight
    or a cached number.
    """

    width: int
    layers: int
    parameters: int
    body: int
    head: int
    attention_width: int
    kv_width: int
    number_bytes: int

    @classmethod
    def of(cls, decoder: PreTrainedModel) -> DecoderSize:
        """Any Llama-type decoder's."""
        config = decoder.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        embeddings = embedding_weight(decoder)
        return cls(
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            parameters=sum(parameter.numel() for parameter in decoder.parameters()),
            body=linear_weights(decoder.get_decoder()),
            head=embeddings.numel(),
            attention_width=config.num_attention_heads * head_dim,
            kv_width=config.num_key_value_heads * head_dim,
            number_bytes=embeddings.element_size(),
        )

    def kv_bytes(self, positions: int) -> int:
        """Keys and values of all layers, kept for this many positions."""
        return 2 * self.layers * self.kv_width * self.number_bytes * positions

    def prefill(self, positions: int, start: int = 0) -> Work:
        """Positions start to start + positions read, each attending to all before it; logits of the last one."""
        attended = positions * start + positions * (positions + 1) / 2
        flops = 2.0 * (self.body * positions + self.head) + 4.0 * self.layers * self.attention_width * attended
        return Work(flops, (self.body + self.head) * self.number_bytes + self.kv_bytes(start + positions))

    def step(self, positions: int, batch: int = 1) -> Work:
        """One token for each of `batch` requests that have `positions` positions kept."""
        attention = 4.0 * self.layers * self.attention_width * positions
        flops = batch * (2.0 * (self.body + self.head) + attention)
        return Work(flops, (self.body + self.head) * self.number_bytes + batch * self.kv_bytes(positions))


@dataclass(frozen=True)
class PaperFormula:
    """Appendix A, as printed: batch 1, two bytes a number there, `number_bytes` here.

    With grouped-query attention the key-value terms shrink by the ratio of the heads. `positions` is s, or s / k
    after compression.
    """

    size: DecoderSize

    def ttft(self, positions: float, peak: float) -> float:
        """(24 d^2 + 4 d s) l s / f, seconds: time to first token."""
        d, layers = self.size.width, self.size.layers
        return (24 * d**2 + 4 * d * positions) * layers * positions / peak

    def ttft_speedup(self, context: int, k: int) -> float:
        """k^2 (6 d s + s^2) / (6 d s k + s^2): how much sooner the first token comes with cached vectors."""
        d, s = self.size.width, context
        return k**2 * (6 * d * s + s**2) / (6 * d * s * k + s**2)

    def ttit(self, positions: float, output: int, bandwidth: float) -> float:
        """(2 n + 4 d l (s + o)) / m, seconds: time per further token."""
        weights = self.size.parameters * self.size.number_bytes
        return (weights + self.kv_bytes(positions, output)) / bandwidth

    def kv_bytes(self, positions: float, output: int) -> float:
        """4 d l (s + o)."""
        size = self.size
        share = size.kv_width / size.attention_width
        return 2 * size.number_bytes * size.width * size.layers * (positions + output) * share


def projection_work(projection: nn.Module, chunks: int, number_bytes: int) -> Work:
    """Chunk vectors to what the decoder reads."""
    weights = linear_weights(projection)
    return Work(2.0 * weights * chunks, weights * number_bytes)


def encoder_weights(encoder: ChunkEncoder) -> tuple[int, int]:
    """Weights that are multiplied for each token, and for each chunk."""
    heads = [getattr(encoder, name) for name in ("pool", "skip") if encoder.token_skip]
    per_chunk = sum(map(linear_weights, heads))
    return linear_weights(encoder) - per_chunk, per_chunk


def encoder_attention(encoder: ChunkEncoder, tokens: int, window: int) -> float:
    """Operations of attention over tokens that are read in windows of so many."""
    config = encoder.backbone.config
    seen = (window + 1) / 2 if encoder.causal else window
    return 4.0 * config.num_hidden_layers * config.hidden_size * tokens * seen


def encoder_work(encoder: ChunkEncoder, chunks: int, number_bytes: int, passage: int = 1) -> Work:
    """Chunks of k tokens to chunk vectors.

    Args: passage: chunks of each passage.
    """
    per_token, per_chunk = encoder_weights(encoder)
    config = encoder.backbone.config
    weights, tokens = (per_token + per_chunk) * number_bytes, chunks * encoder.chunk_size
    windows = -(-passage // encoder.window_chunks)
    attention = encoder_attention(encoder, tokens, encoder.chunk_size * passage // windows)
    if encoder.pooling == "cls":
        attention -= 4.0 * config.hidden_size * tokens * (encoder.chunk_size - 1)
        # Of the last layer all tokens need but keys and values.
        layer = linear_weights(encoder.backbone) // config.num_hidden_layers - 2 * config.hidden_size**2
        per_token, per_chunk = per_token - layer, per_chunk + layer
    flops = 2.0 * (per_token * tokens + per_chunk * chunks) + attention
    return Work(flops, weights)


@dataclass(frozen=True)
class StepWork:
    """What a training step reads.

    sequences: of the decoder. encoded: chunks that the encoder reads for each of them, on average. vectors: that each
    has projected. positions: of each. predicted: those of each that have logits.
    """

    sequences: float
    encoded: float
    vectors: float
    positions: float
    predicted: float


class Passes(NamedTuple):
    """How often a step multiplies each weight of a part.

    1: forward alone. 2: with the gradient of what it reads. 3: with its own too. 0: its vectors are there already.
    """

    encoder: int
    projection: int
    decoder: int
    head: int


def training_flops(model: RefragModel, work: StepWork, passes: Passes) -> float:
    """Multiplications and additions of a step: matrix products and attention, nothing else."""
    size = DecoderSize.of(model.decoder)
    per_token, per_chunk = encoder_weights(model.encoder)
    encoded = (per_chunk + per_token * model.chunk_size) * work.encoded
    # Two products, causal: half of 2 N^2 d.
    attention = size.layers * size.attention_width * work.positions**2
    products = passes.encoder * encoded + passes.projection * linear_weights(model.projection) * work.vectors
    products += passes.decoder * (size.body * work.positions + attention) + passes.head * size.head * work.predicted
    return 2.0 * work.sequences * products
