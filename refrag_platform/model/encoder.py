"""The light encoder: one vector for each chunk of k decoder tokens (section 2).

Chunks are encoded independently of each other and of their position, so vectors can be made once and reused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from refrag_platform.model.segments import PAD


class ChunkEncoder(nn.Module):
    """Token ids of chunks to vectors.

    The backbone is any BERT-type model. It reads *decoder* token ids through a table of its own, so nothing
    is tokenized twice. With `token_skip` the vector lives in the decoder's embedding space, in units of its
    root mean square: it starts as the sum of the chunk's own embeddings over sqrt(k), and the backbone adds
    what context within the chunk gives. A plain projection collapses to a constant within 50 steps.
    """

    decoder_embeddings: Tensor

    def __init__(
        self,
        backbone: PreTrainedModel,
        token_table: Tensor,
        decoder_embeddings: Tensor,
        chunk_size: int,
        pooling: Literal["concat", "mean", "cls"],
        token_skip: bool,
        train_token_table: bool,
    ) -> None:
        """Args: token_table [vocabulary, h], decoder_embeddings [vocabulary, d] of the untrained decoder."""
        super().__init__()
        width, decoder_width = token_table.shape[1], decoder_embeddings.shape[1]
        self.backbone = backbone
        self.chunk_size, self.pooling, self.token_skip = chunk_size, pooling, token_skip
        self.token_table = nn.Parameter(token_table.clone().float(), requires_grad=train_token_table)
        unit = decoder_embeddings.float().pow(2).mean().sqrt()
        self.register_buffer("decoder_embeddings", decoder_embeddings.clone().float() / unit)
        # Lets the backbone see what its own (often uncased) vocabulary can't tell apart.
        self.input_adapter = nn.Linear(decoder_width, width, bias=False)
        nn.init.zeros_(self.input_adapter.weight)
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
        """[n, k] decoder token ids, -1 = padding, to vectors [n, dim].

        `padded=False` promises that nothing is padding (training windows), which spares a look at the data.
        `layers` take the place of the backbone where nothing is padding (model/fused.py).
        """
        real = token_ids != PAD
        if padded is None:
            padded = not bool(real.all())
        ids = token_ids.clamp(min=0)
        embeddings = nn.functional.embedding(ids, self.decoder_embeddings)
        if padded:
            embeddings = embeddings * real[..., None]
        inputs = nn.functional.embedding(ids, self.token_table) + self.input_adapter(embeddings)
        if layers is not None and not padded:
            states = layers(inputs)
        else:
            # Without a mask attention takes its fast path.
            mask = real.long() if padded else None
            states = self.backbone(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
        pooled = self._pool(states * real[..., None] if padded else states, real)
        if not self.token_skip:
            return pooled
        return self.pool(self.norm(pooled)) + self.skip(embeddings.flatten(1))

    def _pool(self, states: Tensor, real: Tensor) -> Tensor:
        if self.pooling == "concat":
            return states.flatten(1)
        if self.pooling == "mean":
            return states.sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        return states[:, 0]

    def settings(self) -> dict[str, Any]:
        """What is needed, besides the tensors, to build this encoder again."""
        return {
            "backbone": self.backbone.config.to_diff_dict() | {"model_type": self.backbone.config.model_type},
            "chunk_size": self.chunk_size,
            "pooling": self.pooling,
            "token_skip": self.token_skip,
            "train_token_table": self.token_table.requires_grad,
        }

    @classmethod
    def empty(cls, settings: dict[str, Any], vocabulary: int, decoder_width: int) -> ChunkEncoder:
        """An encoder of these settings whose tensors are still to be loaded."""
        config = dict(settings["backbone"])
        backbone = AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
        return cls(
            strip_backbone(backbone),
            torch.zeros(vocabulary, backbone.config.hidden_size),
            torch.ones(vocabulary, decoder_width),
            settings["chunk_size"],
            settings["pooling"],
            settings["token_skip"],
            settings["train_token_table"],
        )

    def digest(self) -> str:
        """Hash of all that decides a vector; a store names the encoder that made it by this."""
        digest = hashlib.sha256(f"{self.chunk_size} {self.pooling} {self.token_skip}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The weight [vocabulary, width] of a model's input embeddings."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight


def embedding_size(decoder: PreTrainedModel) -> Tensor:
    """Root mean square of what the decoder reads for its tokens; Gemma-3 multiplies its weight on the way."""
    scale = getattr(decoder.get_input_embeddings(), "embed_scale", 1.0)
    return embedding_weight(decoder).detach().float().pow(2).mean().sqrt() * scale


def strip_backbone(backbone: PreTrainedModel) -> PreTrainedModel:
    """Take the word table and the pooler out: the encoder has a table of its own and pools itself."""
    backbone.set_input_embeddings(nn.Embedding(1, backbone.config.hidden_size))
    for parameter in backbone.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    if getattr(backbone, "pooler", None) is not None:
        setattr(backbone, "pooler", None)  # noqa: B010 (a module may not be None to the type checker)
    return backbone


def token_table(
    backbone: PreTrainedModel,
    encoder_tokenizer: PreTrainedTokenizerFast | None,
    decoder_tokenizer: PreTrainedTokenizerFast,
    vocabulary: int,
    generator: torch.Generator,
) -> Tensor:
    """The encoder's table over decoder ids, [vocabulary, h].

    Each row is the mean of the encoder's own word vectors of the decoder token's text; tokens without text
    (special ones, byte fragments), and all of them when there is no encoder tokenizer, get small random rows.
    """
    words = embedding_weight(backbone).detach().float()
    table = torch.randn(vocabulary, words.shape[1], generator=generator) * words.std()
    if encoder_tokenizer is None:
        return table
    known = min(vocabulary, len(decoder_tokenizer))
    texts = [str(decoder_tokenizer.decode([token])) for token in range(known)]
    usable = [number for number, text in enumerate(texts) if re.search(r"\S", text) and "\ufffd" not in text]
    pieces = encoder_tokenizer([texts[number] for number in usable], add_special_tokens=False)["input_ids"]
    for number, ids in zip(usable, pieces, strict=True):
        if ids:
            table[number] = words[ids].mean(0)
    return table
