"""What a model is made of: decoder, encoder, projection."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from refrag_platform.recipes.base import Section
from refrag_platform.recipes.sources import check_source


class DecoderRecipe(Section):
    """The decoder that reads chunk vectors: any Llama-type causal language model, its code untouched."""

    source: Annotated[str, check_source("random")] = Field(
        description="package:NAME (packaged GGUF weights), hub:ORG/NAME, path:DIR, or random"
    )
    tokenizer: Annotated[str, check_source()] | None = Field(
        None,
        description="path:FILE of a tokenizer.json, relative to the recipe, package:NAME or hub:ORG/NAME; "
        "default: the decoder's own",
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="LlamaConfig values of a `random` decoder, e.g. hidden_size"
    )

    @model_validator(mode="after")
    def _random_alone_is_configured(self) -> DecoderRecipe:
        if self.source != "random":
            self.refuse_idle(f"source is {self.source}", "config")
        elif not self.tokenizer:
            raise ValueError("a random decoder needs `tokenizer: path:FILE`")
        if "vocab_size" in self.config:
            raise ValueError("config.vocab_size has no effect: the tokenizer decides it; leave it out")
        return self


class EncoderRecipe(Section):
    """The light encoder that makes one vector per chunk (section 2)."""

    source: Annotated[str, check_source("random", "decoder")] = Field(
        description="package:NAME, hub:ORG/NAME or path:DIR of a BERT-type model, random, or decoder: a copy of the "
        "decoder's first layers, which read its own embeddings"
    )
    layers: int | None = Field(None, ge=1, description="of a `decoder` source: how many of its layers are copied")
    window: Literal["chunk", "passage"] = Field(
        "chunk",
        description="what is read together to make a chunk's vector: the chunk alone, as in the paper, or its passage; "
        "stored vectors are then those of whole passages",
    )
    window_tokens: int = Field(
        512, ge=1, description="longest window of a passage; a longer passage is cut into as few equal ones as can be"
    )
    config: dict[str, Any] = Field(default_factory=dict, description="BertConfig values of a `random` encoder")
    chunk_size: int = Field(8, ge=1, le=256, description="k: decoder tokens replaced by one vector")
    rates: list[int] = Field(
        [1],
        min_length=1,
        description="numbers of neighbouring chunks whose mean vector the decoder reads as one, e.g. [1, 2, 4]: from "
        "one store a request reads k, 2k or 4k tokens a vector; cpt.reading and finetuned draw one for each step",
    )
    pooling: Literal["concat", "mean", "cls"] = Field(
        "concat", description="how the k token states become one vector; concat keeps their order"
    )
    token_skip: bool = Field(
        True,
        description="add a linear code of the chunk's own decoder embeddings, so that vectors start in the "
        "decoder's embedding space and cannot collapse to a constant",
    )
    train_token_table: bool = Field(
        False,
        description="train the encoder's token table too; frozen, it can be rebuilt from the packaged weights",
    )

    @model_validator(mode="after")
    def _random_alone_is_configured(self) -> EncoderRecipe:
        if self.source != "random":
            self.refuse_idle(f"source is {self.source}", "config")
        return self

    @model_validator(mode="after")
    def _layers_are_the_decoders(self) -> EncoderRecipe:
        if self.source != "decoder":
            self.refuse_idle(f"source is {self.source}, not decoder", "layers")
        else:
            self.refuse_idle("source is decoder, whose own embeddings are read", "train_token_table")
            if self.layers is None:
                raise ValueError("source is decoder: say how many of its layers are copied, e.g. `layers: 6`")
        return self

    @model_validator(mode="after")
    def _rates_begin_with_one(self) -> EncoderRecipe:
        if self.rates[0] != 1 or self.rates != sorted(set(self.rates)):
            raise ValueError(f"rates is {self.rates}; begin with 1, the chunks of the store, and go up, e.g. [1, 2, 4]")
        return self

    @model_validator(mode="after")
    def _window_fits(self) -> EncoderRecipe:
        if self.window == "chunk":
            self.refuse_idle("window is chunk", "window_tokens")
        elif self.window_tokens < 2 * self.chunk_size:
            raise ValueError(
                f"window_tokens is {self.window_tokens}, less than two chunks of {self.chunk_size} tokens; raise it, "
                "or set window: chunk"
            )
        if self.pooling == "cls" and (self.window == "passage" or self.source == "decoder"):
            raise ValueError(
                "pooling is cls: a chunk's first token stands for all of it only where a BERT-type encoder reads the "
                "chunk alone; set pooling: concat or mean"
            )
        return self


class ProjectionRecipe(Section):
    """Two-layer MLP from the encoder's vector to the decoder's embedding size (section 2)."""

    hidden_size: int | None = Field(None, ge=1, description="default: the decoder's embedding size, as in the paper")
    activation: Literal["gelu", "silu", "relu"] = Field("gelu", description="between the two layers")
