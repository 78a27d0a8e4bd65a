"""The light encoder: one vector for each chunk of k decoder tokens (section 2).

A vector depends on what the encoder read together with its chunk, its window: the chunk alone, as in the paper, or its
passage (ours). It never depends on another passage or on the place in a prompt, so vectors can be made once and reused.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, PreTrainedModel

from refrag_platform.errors import RecipeError
from refrag_platform.model.backbone import first_position, most_tokens, strip_backbone
from refrag_platform.model.digests import weights_digest
from refrag_platform.model.segments import PAD, cut_windows

Pooling = Literal["concat", "mean", "cls"]
# Chunks in one batch of passages.
ENCODED_AT_ONCE = 2048
# Tokens that a CPU encodes at once: states of more leave its caches, and their memory is given back after each layer.
CPU_BATCH_TOKENS = 1024


class WindowLayout(NamedTuple):
    """Where the windows of token rows [B, T] lie. By default each row is one window, and nothing is padding.

    real: [B, T] bool, what is no padding. mask: [B, 1, T, T] bool, positions: [B, T] within their windows, both where
    a row holds several.
    """

    real: Tensor | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None


class ChunkEncoder(nn.Module, ABC):
    """Token ids of passages to the vectors of their chunks: the base of encoders, which differ in how a window is read.

    With `token_skip` the vector lives in the decoder's embedding space, in units of its root mean square: it starts as
    the sum of the chunk's own embeddings over sqrt(k), and the backbone adds what the window gives. A plain projection
    collapses to a constant within 50 steps.
    """

    kind: ClassVar[str]
    # Whether a chunk's vector is free of the text after it.
    causal: ClassVar[bool]
    decoder_embeddings: Tensor

    def __init__(
        self,
        backbone: PreTrainedModel,
        decoder_embeddings: Tensor,
        chunk_size: int,
        pooling: Pooling,
        token_skip: bool,
        window_chunks: int,
    ) -> None:
        """
        Args:
            decoder_embeddings: [vocabulary, d] of the untrained decoder. window_chunks: most chunks in a window.

        Raises:
            RecipeError: windows have more tokens than the backbone has positions.
        """
        super().__init__()
        width, decoder_width = backbone.config.hidden_size, decoder_embeddings.shape[1]
        self.backbone = backbone
        self.chunk_size, self.pooling, self.token_skip = chunk_size, pooling, token_skip
        self.window_chunks = window_chunks
        most = most_tokens(backbone)
        if most is not None and window_chunks * chunk_size > most:
            raise RecipeError(
                f"the encoder would read {window_chunks * chunk_size} tokens at once, but its "
                f"{type(backbone).__name__} has {most} positions; lower "
                f"encoder.{'window_tokens' if window_chunks > 1 else 'chunk_size'}"
            )
        unit = decoder_embeddings.float().pow(2).mean().sqrt()
        self.register_buffer("decoder_embeddings", decoder_embeddings.clone().float() / unit)
        pooled = width * (chunk_size if pooling == "concat" else 1)
        self.vector_dim = decoder_width if token_skip else pooled
        if token_skip:
            self.norm = nn.LayerNorm(pooled)
            self.pool = nn.Linear(pooled, decoder_width)
            nn.init.zeros_(self.pool.weight)
            nn.init.zeros_(self.pool.bias)
            self.skip = nn.Linear(chunk_size * decoder_width, decoder_width, bias=False)
            with torch.no_grad():
                self.skip.weight.copy_(torch.eye(decoder_width).repeat(1, chunk_size) * chunk_size**-0.5)

    def forward(
        self, token_ids: Tensor, padded: bool | None = None, layers: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Passages of L chunks, [..., L, k] decoder token ids with -1 = padding, to vectors [..., L, dim].

        Padding stands behind a passage's tokens; the vector of a chunk that is nothing but padding means nothing.
        `padded=False` promises that nothing is padding (training windows), which spares a look at the data.
        `layers` take the place of the backbone where nothing is padding (model/fused.py).
        """
        if padded is None:
            padded = bool((token_ids == PAD).any())
        *several, chunks, k = token_ids.shape
        passages = token_ids.reshape(math.prod(several), chunks, k)
        windows, places = cut_windows(passages, self.window_chunks, padded)
        rows = windows.flatten(1)
        vectors = self._encode(rows, WindowLayout(rows != PAD if padded or places is not None else None), layers)
        if places is not None:
            vectors = vectors[places]
        return vectors.reshape(*several, chunks, self.vector_dim)

    def encode_rows(self, token_ids: Tensor, windows: Tensor) -> Tensor:
        """Rows of several passages each, [B, L, k] token ids, to vectors [B, L, dim]: as each passage has by itself.

        Nothing is padded to the longest window, as `forward` does.

        Args: windows: [B, L], the number of a chunk's window in its row, -1 for padding; of one stand together.
        """
        if self.window_chunks == 1:
            return self(token_ids, padded=True)
        k, places = self.chunk_size, torch.arange(windows.shape[1], device=windows.device)
        first = torch.where(windows != windows.roll(1, 1), places, 0)
        first[:, 0] = 0
        offsets = (places - first.cummax(1).values)[..., None] * k + torch.arange(k, device=windows.device)
        numbers, real = windows.repeat_interleave(k, 1), (token_ids != PAD).flatten(1)
        offsets = torch.where(windows[..., None] < 0, 0, offsets)
        tokens = numbers.shape[1]
        mask = numbers[:, :, None] == numbers[:, None]
        if self.causal:
            mask &= torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
        else:
            # Attention over nothing at all is not a number.
            mask &= real[:, None] | torch.eye(tokens, dtype=torch.bool, device=mask.device)
        vectors = self._encode(token_ids.flatten(1), WindowLayout(real, mask[:, None], offsets.flatten(1)))
        return vectors.view(*windows.shape, self.vector_dim)

    def _encode(
        self, token_ids: Tensor, layout: WindowLayout, layers: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Rows of whole chunks [m, w k] to the vectors of all their chunks [m w, dim]."""
        k, real = self.chunk_size, layout.real
        ids = token_ids.clamp(min=0)
        embeddings = nn.functional.embedding(ids, self.decoder_embeddings)
        if real is not None:
            embeddings = embeddings * real[..., None]
        states = self.states(ids, embeddings, layout, layers)
        if self.pooling == "cls":  # Its windows are single chunks.
            pooled = states[:, 0]
        else:
            if real is not None:
                states = states * real[..., None]
            states = states.reshape(-1, k, states.shape[-1])
            pooled = states.flatten(1) if self.pooling == "concat" else states.sum(1)
            if self.pooling == "mean":
                pooled = pooled / (token_ids != PAD).view(-1, k).sum(1, keepdim=True).clamp(min=1)
        if not self.token_skip:
            return pooled
        return self.pool(self.norm(pooled)) + self.skip(embeddings.reshape(len(pooled), -1))

    @abstractmethod
    def states(
        self, ids: Tensor, embeddings: Tensor, layout: WindowLayout, layers: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The backbone's last states [m, T, h] of windows.

        Args: ids: [m, T], 0 where there is padding. embeddings: [m, T, d] of the ids, in units of their root mean
            square.
        """

    def encode_passages(self, passages: Sequence[Tensor], at_once: int = ENCODED_AT_ONCE) -> list[Tensor]:
        """Vectors [L, dim] of each of these passages [L, k]: those of like length in one batch of `at_once` chunks."""
        device = self.decoder_embeddings.device
        if device.type == "cpu":
            at_once = min(at_once, CPU_BATCH_TOKENS // self.chunk_size)
        longest_first = sorted(range(len(passages)), key=lambda number: -len(passages[number]))
        vectors: dict[int, Tensor] = {}
        while len(vectors) < len(passages):
            rest = longest_first[len(vectors) :]
            batch = rest[: max(1, at_once // max(1, len(passages[rest[0]])))]
            token_ids = pad_sequence([passages[number] for number in batch], batch_first=True, padding_value=PAD)
            for number, encoded in zip(batch, self(token_ids.to(device)), strict=True):
                vectors[number] = encoded[: len(passages[number])]
        return [vectors[number] for number in range(len(passages))]

    def pretrained(self) -> list[nn.Parameter]:
        """Parameters that were trained before; the others are new."""
        return list(self.backbone.parameters())

    def settings(self) -> dict[str, Any]:
        """What is needed, besides the tensors, to build this encoder again."""
        config = self.backbone.config.to_diff_dict() | {"model_type": self.backbone.config.model_type}
        return {
            "kind": self.kind,
            "backbone": config,
            "chunk_size": self.chunk_size,
            "pooling": self.pooling,
            "token_skip": self.token_skip,
            "window_chunks": self.window_chunks,
        }

    @staticmethod
    def empty(settings: dict[str, Any], vocabulary: int, decoder_width: int) -> ChunkEncoder:
        """An encoder of these settings whose tensors are still to be loaded."""
        config = dict(settings["backbone"])
        config.pop("dtype", None)  # Tensors have what they are loaded as.
        backbone = AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
        names = ("chunk_size", "pooling", "token_skip")
        # Models that were saved before there was a choice have neither a kind nor a window.
        shape = {name: settings[name] for name in names} | {"window_chunks": settings.get("window_chunks", 1)}
        embeddings = torch.ones(vocabulary, decoder_width)
        if settings.get("kind") == LayersEncoder.kind:
            return LayersEncoder(strip_backbone(backbone), embeddings, settings["embedding_size"], **shape)
        table = torch.zeros(vocabulary, backbone.config.hidden_size)
        trained = settings["train_token_table"]
        return BertEncoder(strip_backbone(backbone), table, embeddings, train_token_table=trained, **shape)

    def digest(self) -> str:
        """Hash of all that decides a vector; a store names the encoder that made it by this."""
        shape = f"{self.chunk_size} {self.pooling} {self.token_skip}"
        if self.window_chunks > 1:
            shape += f" {self.window_chunks}"
        return weights_digest(self, shape)


class BertEncoder(ChunkEncoder):
    """Any BERT-type backbone; every token of a window sees all others.

    It reads *decoder* token ids through a table of its own, so nothing is tokenized twice.
    """

    kind, causal = "bert", False

    def __init__(
        self,
        backbone: PreTrainedModel,
        token_table: Tensor,
        decoder_embeddings: Tensor,
        chunk_size: int,
        pooling: Pooling,
        token_skip: bool,
        train_token_table: bool,
        window_chunks: int = 1,
    ) -> None:
        """Args: token_table [vocabulary, h]; the others as the base has them."""
        super().__init__(backbone, decoder_embeddings, chunk_size, pooling, token_skip, window_chunks)
        self.token_table = nn.Parameter(token_table.clone().float(), requires_grad=train_token_table)
        # Lets the backbone see what its own (often uncased) vocabulary can't tell apart.
        self.input_adapter = nn.Linear(decoder_embeddings.shape[1], token_table.shape[1], bias=False)
        nn.init.zeros_(self.input_adapter.weight)

    def states(
        self, ids: Tensor, embeddings: Tensor, layout: WindowLayout, layers: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        inputs = nn.functional.embedding(ids, self.token_table) + self.input_adapter(embeddings)
        real, mask, positions = layout
        if layers is not None and real is None:
            return layers(inputs)
        if positions is not None:
            positions = positions + first_position(self.backbone)
        elif real is not None:  # Without a mask attention takes its fast path.
            mask = real.long()
            # Attention over nothing at all is not a number.
            mask[:, 0] = 1
        return self.backbone(inputs_embeds=inputs, attention_mask=mask, position_ids=positions).last_hidden_state

    def pretrained(self) -> list[nn.Parameter]:
        return [*super().pretrained(), self.token_table]

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"train_token_table": self.token_table.requires_grad}


class LayersEncoder(ChunkEncoder):
    """A copy of the decoder's first layers (ours).

    They read the decoder's own embeddings, and of each token only what stands before it.
    """

    kind, causal = "layers", True

    def __init__(
        self,
        backbone: PreTrainedModel,
        decoder_embeddings: Tensor,
        embedding_size: float,
        chunk_size: int,
        pooling: Pooling,
        token_skip: bool,
        window_chunks: int = 1,
    ) -> None:
        """Args: embedding_size: root mean square of what the decoder reads for tokens; the others as the base has."""
        super().__init__(backbone, decoder_embeddings, chunk_size, pooling, token_skip, window_chunks)
        self.embedding_size = embedding_size

    def states(
        self, ids: Tensor, embeddings: Tensor, layout: WindowLayout, layers: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        inputs = embeddings * self.embedding_size
        if torch.is_autocast_enabled(inputs.device.type):  # The residual stream too, as the decoder's in training.
            inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
        # Padding stands behind the tokens, where none of them sees it: windows by themselves need no mask.
        return self.backbone(
            inputs_embeds=inputs, use_cache=False, attention_mask=layout.mask, position_ids=layout.positions
        ).last_hidden_state

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"embedding_size": self.embedding_size}
