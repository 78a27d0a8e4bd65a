"""What is measured: a decoder with an encoder and a projection for each k, of a named shape or the project's own.

A shape has the dimensions of a model and random weights: times don't depend on what weights say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.model.backbone import embedding_weight, strip_backbone
from refrag_platform.model.decoder import in_dtype
from refrag_platform.model.encoder import BertEncoder, ChunkEncoder, LayersEncoder
from refrag_platform.model.loading import load_bundle
from refrag_platform.model.projection import Projection
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project

RANDOM_STD = 0.02
LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
ROBERTA_LARGE = {
    "model_type": "roberta",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}
MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}
TINY_ENCODER = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Shape:
    """A model's dimensions: LlamaConfig and encoder config values, and its own k and pooling."""

    decoder: dict[str, Any]
    encoder: dict[str, Any]
    chunk_size: int
    pooling: Literal["concat", "mean", "cls"]


# Of the recipes of these names, with random weights; smollm2-135m with MiniLM-L6, which reads each chunk alone.
SHAPES = {
    "llama-2-7b": Shape(LLAMA_2_7B, ROBERTA_LARGE, 16, "cls"),
    "smollm2-135m": Shape(SMOLLM2_135M, MINILM, 8, "concat"),
    "tiny": Shape(TINY, TINY_ENCODER, 4, "concat"),
}


@dataclass
class Subject:
    """A decoder, and what turns chunks of k tokens into its input, for any k."""

    name: str
    weights: Literal["random", "untrained", "finetuned"]
    decoder: PreTrainedModel
    encoder: ChunkEncoder
    projection: Projection
    others: dict[int, tuple[ChunkEncoder, Projection]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return embedding_weight(self.decoder).dtype

    def is_random(self, k: int) -> bool:
        """Whether the way from chunks of k tokens to the decoder has random weights."""
        return self.weights == "random" or k != self.encoder.chunk_size

    def at(self, k: int) -> tuple[ChunkEncoder, Projection]:
        """Encoder and projection for chunks of k tokens; for another k than the model's own with a new, random head."""
        if k == self.encoder.chunk_size:
            return self.encoder, self.projection
        if k not in self.others:
            self.others[k] = self._at_random(k)
        return self.others[k]

    def _at_random(self, k: int) -> tuple[ChunkEncoder, Projection]:
        original, settings = self.encoder, self.projection.settings()
        # Of as many tokens, but where each chunk is read alone.
        window = max(1, original.window_chunks * original.chunk_size // k) if original.window_chunks > 1 else 1
        shape = (k, original.pooling, original.token_skip)
        with _drawn_on(self.device, torch.float32, seed=k):
            encoder: ChunkEncoder
            if isinstance(original, BertEncoder):
                encoder = BertEncoder(
                    original.backbone, original.token_table, original.decoder_embeddings, *shape, False, window
                )
            else:
                assert isinstance(original, LayersEncoder)
                encoder = LayersEncoder(
                    original.backbone, original.decoder_embeddings, original.embedding_size, *shape, window
                )
            heads = [getattr(encoder, name) for name in ("pool", "skip") if original.token_skip]
            width = embedding_weight(self.decoder).shape[1]
            projection = Projection(
                encoder.vector_dim,
                width,
                settings["hidden_size"],
                settings["activation"],
                original.token_skip,
                settings["unit"],
            )
            _randomize(*heads, projection)
        # The tables are the model's own, once in memory.
        encoder.decoder_embeddings = original.decoder_embeddings
        if isinstance(original, BertEncoder):
            encoder.token_table = original.token_table
        return encoder.to(self.dtype).eval(), projection.to(self.dtype).eval()


def named_shape(name: str, device: torch.device, dtype: torch.dtype) -> Subject:
    """A shape of SHAPES with random weights, made where it runs.

    Raises:
        RefragError: there is no shape of this name.
    """
    if name not in SHAPES:
        raise RefragError(f"there is no shape {name!r}; there are {', '.join(SHAPES)}")
    shape = SHAPES[name]
    config = LlamaConfig(**shape.decoder)
    config._attn_implementation = "sdpa"
    with _drawn_on(device, dtype, seed=0):
        decoder = LlamaForCausalLM(config).eval()
    encoder_config = dict(shape.encoder)
    backbone_config = AutoConfig.for_model(encoder_config.pop("model_type"), **encoder_config)
    backbone_config._attn_implementation = "sdpa"
    width, hidden = config.hidden_size, backbone_config.hidden_size
    with _drawn_on(device, torch.float32, seed=0):
        encoder = BertEncoder(
            strip_backbone(AutoModel.from_config(backbone_config, dtype=torch.float32)),
            torch.randn(config.vocab_size, hidden) * RANDOM_STD,
            embedding_weight(decoder).detach(),
            shape.chunk_size,
            shape.pooling,
            token_skip=True,
            train_token_table=False,
        )
        projection = Projection(encoder.vector_dim, width, width, "gelu", residual=True, unit=RANDOM_STD)
        _randomize(encoder, projection)
    return Subject(name, "random", decoder, encoder.to(dtype).eval(), projection.to(dtype).eval())


def project_model(name: str, device: torch.device, dtype: torch.dtype, project: Project) -> Subject:
    """A model of the project: its fine-tuned checkpoint, or, where that is not made yet, the recipe's weights.

    Raises:
        RefragError: there is no such recipe, or its weights can't be had.
    """
    weights: Literal["finetuned", "untrained"] = "finetuned"
    try:
        model = load_bundle(name, project, device, dtype).model
    except ArtifactError:
        weights = "untrained"
        model = RefragModel.create(project.recipe(name), project.recipe_path(name).parent)
        model = in_dtype(model, dtype).to(device).eval()
    return Subject(name, weights, model.decoder, model.encoder, model.projection)


@contextmanager
def _drawn_on(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """New modules are made on `device` in `dtype`, their weights drawn from `seed`; random states stay as they were."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _randomize(*modules: nn.Module) -> None:
    """Weights that start at zero for training: a GPU multiplies zeros faster than numbers."""
    for module in modules:
        for child in module.modules():
            if isinstance(child, nn.Linear):
                nn.init.normal_(child.weight, std=RANDOM_STD)
