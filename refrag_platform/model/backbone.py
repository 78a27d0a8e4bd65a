"""What an encoder is made of that was trained before: embeddings, layers, and the words that they know."""

from __future__ import annotations

import copy
import re
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from refrag_platform.errors import RecipeError
from refrag_platform.model.families import most_positions


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The weight [vocabulary, width] of a model's input embeddings."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight


def embedding_size(decoder: PreTrainedModel) -> Tensor:
    """Root mean square of what the decoder reads for its tokens; Gemma-3 multiplies its weight on the way."""
    scale = getattr(decoder.get_input_embeddings(), "embed_scale", 1.0)
    return embedding_weight(decoder).detach().float().pow(2).mean().sqrt() * scale


def first_layers(decoder: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy of the decoder's first layers and its final norm, to be trained by itself.

    Raises:
        RecipeError: the decoder has fewer layers.
    """
    body = decoder.get_decoder()
    config: PretrainedConfig = copy.deepcopy(body.config)
    if layers > config.num_hidden_layers:
        raise RecipeError(
            f"encoder.layers is {layers}, but the decoder has {config.num_hidden_layers} layers; give at most as many"
        )
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with torch.random.fork_rng(devices=[]):
        backbone = AutoModel.from_config(
            config, dtype=torch.float32, attn_implementation=config._attn_implementation
        ).eval()
    tensors = body.state_dict()
    backbone.load_state_dict({name: tensors[name] for name in backbone.state_dict()})
    return backbone


def strip_backbone(backbone: PreTrainedModel) -> PreTrainedModel:
    """Take the word table and the pooler out: the encoder has a table of its own and pools itself."""
    backbone.set_input_embeddings(nn.Embedding(1, backbone.config.hidden_size).requires_grad_(False))
    if getattr(backbone, "pooler", None) is not None:
        setattr(backbone, "pooler", None)  # noqa: B010 (a module may not be None to the type checker)
    return backbone


def most_tokens(backbone: PreTrainedModel) -> int | None:
    """Tokens that a backbone reads at once; None where its config names no limit."""
    most = most_positions(backbone)
    return None if most is None else most - first_position(backbone)


def first_position(backbone: PreTrainedModel) -> int:
    """RoBERTa's positions begin behind that of padding."""
    return int(getattr(getattr(backbone, "embeddings", None), "padding_idx", -1)) + 1


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
