"""RefragModel: encoder, projection and an unmodified decoder in one module that saves and loads as a folder.

model = RefragModel.load(Path("models/tiny/finetuned/content"))
inputs = model.embed([[Text(question_ids), Chunks(passage_ids)]])
logits = model.decoder(inputs_embeds=inputs.embeds, attention_mask=inputs.attention_mask).logits
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.files import write_json
from refrag_platform.model.backbone import embedding_size, embedding_weight, first_layers, strip_backbone, token_table
from refrag_platform.model.decoder import in_dtype
from refrag_platform.model.encoder import BertEncoder, ChunkEncoder, LayersEncoder
from refrag_platform.model.projection import Projection
from refrag_platform.model.prompts import token_id
from refrag_platform.model.segments import PAD, Chunks, Prompt, lay_out, pool_vectors
from refrag_platform.quiet import quietly
from refrag_platform.recipes import Recipe
from refrag_platform.weights import load_decoder, load_encoder, load_tokenizer

FORMAT = 1
SETTINGS_FILE, WEIGHTS_FILE = "model.json", "encoder.safetensors"


@dataclass(frozen=True)
class DecoderInputs:
    """What the decoder is called with: embeds [B, N, d], attention_mask [B, N] bool, position_ids [B, N]."""

    embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor


class RefragModel(nn.Module):
    """A decoder that reads chunks of passages as single vectors.

    rates: numbers m of the encoder's chunks that it is trained to read as one, by the mean of their vectors (ours);
    rate: the one that prompts are laid out with, 1 but for what `at_rate` returns.
    """

    def __init__(
        self,
        encoder: ChunkEncoder,
        projection: Projection,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        rates: Sequence[int] = (1,),
    ) -> None:
        """
        Raises:
            RefragError: the tokenizer makes tokens that the decoder has no embedding for.
        """
        super().__init__()
        # Added tokens may lie beyond: Gemma-3's tokenizer knows one for pictures.
        known, rows = tokenizer.vocab_size, embedding_weight(decoder).shape[0]
        if known > rows:
            raise RefragError(
                f"the tokenizer has {known:,} tokens, the decoder embeddings for {rows:,}: text would be read beyond "
                "their end; name the decoder's own tokenizer (decoder.tokenizer)"
            )
        self.encoder, self.projection, self.decoder = encoder, projection, decoder
        self.tokenizer, self.rates, self.rate = tokenizer, tuple(rates), 1
        self._digest: str | None = None
        # What starts a sequence without context: the token that stood between documents in pre-training.
        candidates = (token_id(tokenizer, "<|endoftext|>"), tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        self.start_token_id: int = next(token for token in candidates if token is not None)

    @classmethod
    def create(cls, recipe: Recipe, base: Path) -> RefragModel:
        """An untrained model of a recipe; `base` is the recipe's folder, for `path:` sources.

        Raises:
            RefragError: a package, path or hub id of the recipe can't be had.
            RecipeError: the encoder's windows or layers are more than its backbone or the decoder has.
        """
        decoder = load_decoder(recipe.decoder, base, recipe.seed)
        tokenizer = load_tokenizer(recipe.decoder, base)
        width = embedding_weight(decoder).shape[1]
        make_encoder = _encoder_maker(recipe, base, decoder, tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            encoder = make_encoder()
            projection = Projection(
                encoder.vector_dim,
                width,
                recipe.projection.hidden_size or width,
                recipe.projection.activation,
                residual=recipe.encoder.token_skip,
                unit=float(embedding_size(decoder)),
            )
        return cls(encoder, projection, decoder, tokenizer, recipe.encoder.rates)

    def at_rate(self, rate: int) -> RefragModel:
        """This model, sharing all weights, with chunks of `rate` of the encoder's: its k is so many times as large.

        Raises:
            RefragError: it is not trained for that.
        """
        if rate not in self.rates:
            raise RefragError(
                f"rate is {rate}, and this model is trained for {', '.join(map(str, self.rates))}; ask for one of "
                "those, or train with more encoder.rates in the recipe"
            )
        view = copy.copy(self)
        view.rate = rate
        return view

    @property
    def chunk_size(self) -> int:
        """k: decoder tokens in a chunk, as prompts are laid out."""
        return self.encoder.chunk_size * self.rate

    @property
    def vector_dim(self) -> int:
        """Numbers in one chunk vector."""
        return self.encoder.vector_dim

    @property
    def device(self) -> torch.device:
        return self.projection.inner.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    def encoder_digest(self) -> str:
        """Hash of the encoder, kept after the first call while the model is in evaluation mode."""
        if self.training or self._digest is None:
            self._digest = self.encoder.digest()
        return self._digest

    def encode(self, token_ids: Tensor, padded: bool | None = None) -> Tensor:
        """Chunk vectors [..., L, vector_dim] of passages [..., L, k], -1 = padding (`padded=False`: there is none).

        Of chunks as wide as several of the encoder's, the mean of theirs; so in all that encodes.
        """
        chunks = self._encoder_chunks(token_ids.to(self.device))
        return _pooled(self.encoder(chunks, padded), chunks, token_ids)

    def encode_rows(self, token_ids: Tensor, windows: Tensor) -> Tensor:
        """Vectors [B, L, vector_dim] of rows of several passages, [B, L, k].

        Args: windows: as `ChunkEncoder.encode_rows` has them, [B, L m] where a chunk is m of the encoder's.
        """
        chunks = self._encoder_chunks(token_ids)
        return _pooled(self.encoder.encode_rows(chunks, windows), chunks, token_ids)

    def with_vectors(self, passages: Sequence[Chunks]) -> list[Chunks]:
        """The passages, each with the vectors of all its chunks; those that came without are encoded."""
        missing = [passage.token_ids for passage in passages if passage.vectors is None]
        chunks = [self._encoder_chunks(token_ids) for token_ids in missing]
        encoded = map(_pooled, self.encoder.encode_passages(chunks), chunks, missing)
        return [p if p.vectors is not None else replace(p, vectors=next(encoded)) for p in passages]

    def _encoder_chunks(self, token_ids: Tensor) -> Tensor:
        """Chunks [..., L, m k] cut into the encoder's, [..., L m, k]."""
        return token_ids.unflatten(-1, (-1, self.encoder.chunk_size)).flatten(-3, -2)

    def project(self, vectors: Tensor) -> Tensor:
        """What the decoder reads, [n, d], for vectors [n, vector_dim]."""
        return self.projection(vectors.to(self.device, self.projection.inner.weight.dtype))

    def gather(self, token_ids: Tensor, chunk_index: Tensor, chunk_embeds: Tensor) -> Tensor:
        """Decoder input [B, N, d]: the chunk's embedding where chunk_index >= 0, else the token's."""
        tokens = self.decoder.get_input_embeddings()(token_ids)
        if chunk_embeds.shape[0] == 0:
            return tokens
        chunks = nn.functional.embedding(chunk_index.clamp(min=0), chunk_embeds.to(tokens.dtype))
        return torch.where((chunk_index >= 0)[..., None], chunks, tokens)

    def embed(self, prompts: Sequence[Prompt], padding_side: Literal["left", "right"] = "left") -> DecoderInputs:
        """Decoder input of a batch of prompts; vectors that prompts don't bring are encoded here."""
        layout = lay_out(prompts, self.chunk_size, padding_side)
        compressed = [passage.compressed_vectors() for passage in self.with_vectors(layout.passages)]
        vectors = torch.cat([part.to(self.device) for part in compressed] or [torch.empty(0, self.vector_dim)])
        embeds = self.gather(
            layout.token_ids.to(self.device), layout.chunk_index.to(self.device), self.project(vectors)
        )
        return DecoderInputs(embeds, layout.attention_mask.to(self.device), layout.position_ids.to(self.device))

    def forward(self, prompts: Sequence[Prompt], padding_side: Literal["left", "right"] = "left") -> Tensor:
        """Logits [B, N, vocabulary] of a batch of prompts."""
        inputs = self.embed(prompts, padding_side)
        return self.decoder(
            inputs_embeds=inputs.embeds,
            attention_mask=inputs.attention_mask.long(),
            position_ids=inputs.position_ids,
            use_cache=False,
        ).logits

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write model.json, encoder.safetensors, decoder/ and tokenizer/ into an existing folder."""
        state = {
            f"{part}.{name}": tensor.detach().to("cpu", dtype).contiguous()
            for part, module in (("encoder", self.encoder), ("projection", self.projection))
            for name, tensor in module.state_dict().items()
        }
        save_file(state, folder / WEIGHTS_FILE)
        # A copy in the right type would double the memory; the state dict does not. Tied weights stay one tensor in it,
        # or they would be written twice.
        tensors = {name: tensor.detach() for name, tensor in self.decoder.state_dict().items()}
        places = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in tensors.items()}
        converted = {places[name]: tensor.to("cpu", dtype) for name, tensor in tensors.items()}
        decoder_state = {name: converted[place] for name, place in places.items()}
        with quietly():
            self.decoder.save_pretrained(folder / "decoder", state_dict=decoder_state)
        _set_dtype(folder / "decoder" / "config.json", dtype)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        settings = {
            "format": FORMAT,
            "encoder": self.encoder.settings(),
            "projection": self.projection.settings(),
            "encoder_digest": self.encoder.digest(),
            "rates": self.rates,
            "vector_dim": self.vector_dim,
        }
        write_json(folder / SETTINGS_FILE, settings, sort_keys=True)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> RefragModel:
        """The model in `folder`, in evaluation mode.

        Raises:
            ArtifactError: the folder holds no model, or one of another format.
        """
        settings = read_settings(folder)
        with quietly():
            decoder = AutoModelForCausalLM.from_pretrained(folder / "decoder", dtype=dtype, attn_implementation="sdpa")
        tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder / "tokenizer"))
        vocabulary, width = embedding_weight(decoder).shape
        encoder = ChunkEncoder.empty(settings["encoder"], vocabulary, width)
        projection = Projection(
            encoder.vector_dim,
            width,
            settings["projection"]["hidden_size"],
            settings["projection"]["activation"],
            residual=encoder.token_skip,
            unit=settings["projection"]["unit"],
        )
        tensors = load_file(folder / WEIGHTS_FILE)
        modules: dict[str, nn.Module] = {"encoder.": encoder, "projection.": projection}
        for part, module in modules.items():
            module.load_state_dict({n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)})
        model = in_dtype(cls(encoder, projection, decoder, tokenizer, settings["rates"]), dtype).to(device).eval()
        model._digest = settings["encoder_digest"]
        return model


def _pooled(vectors: Tensor, chunks: Tensor, token_ids: Tensor) -> Tensor:
    """Vectors of the encoder's chunks [..., L m, k], for each [..., L, m k] of which they are."""
    return pool_vectors(vectors, chunks[..., 0] != PAD, token_ids.shape[-1] // chunks.shape[-1])


def _encoder_maker(
    recipe: Recipe, base: Path, decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Callable[[], ChunkEncoder]:
    """What makes the encoder that the recipe names, its new weights drawn from the global random state."""
    settings, embeddings = recipe.encoder, embedding_weight(decoder).detach().float()
    k, pooling, skip = settings.chunk_size, settings.pooling, settings.token_skip
    window = 1 if settings.window == "chunk" else settings.window_tokens // k
    if settings.layers is not None:
        layers, size = first_layers(decoder, settings.layers), float(embedding_size(decoder))
        return lambda: LayersEncoder(strip_backbone(layers), embeddings, size, k, pooling, skip, window)
    backbone, encoder_tokenizer = load_encoder(settings, base, recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    table = token_table(backbone, encoder_tokenizer, tokenizer, embeddings.shape[0], generator)
    trained = settings.train_token_table
    return lambda: BertEncoder(strip_backbone(backbone), table, embeddings, k, pooling, skip, trained, window)


def read_settings(folder: Path) -> dict[str, Any]:
    """model.json of a model folder.

    Raises:
        ArtifactError: there is none, or it is of another format.
    """
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no model: {SETTINGS_FILE} is missing") from None
    if settings.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder / SETTINGS_FILE} has format {settings.get('format')!r}; this version reads {FORMAT}"
        )
    # Models that were saved before there was a choice have no rates.
    return {"rates": [1]} | settings


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    """config.json must name the type of the saved tensors, not that of the training weights."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values["dtype"] = str(dtype).removeprefix("torch.")
    write_json(config, values, sort_keys=True, allow_nan=True)
