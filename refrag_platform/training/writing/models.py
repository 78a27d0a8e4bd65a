"""The two decoders: the one that writes questions and the one that answers them from full text."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.compact.packing import load_packed
from refrag_platform.errors import ArtifactError
from refrag_platform.model.decoder import in_dtype
from refrag_platform.model.loading import default_dtype
from refrag_platform.model.refrag import SETTINGS_FILE
from refrag_platform.project import Project
from refrag_platform.quiet import quietly
from refrag_platform.recipes import DecoderRecipe, control_name
from refrag_platform.weights import load_decoder, load_tokenizer

DECODER, TOKENIZER = "decoder", "tokenizer"


class TextModel(NamedTuple):
    """A decoder with its tokenizer, and what it was read from."""

    decoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    source: Path
    digest: str

    def on(self, device: torch.device) -> TextModel:
        """Ready to generate: in evaluation mode, in bfloat16 on CUDA, in float32 elsewhere."""
        nn.Module.to(in_dtype(self.decoder, default_dtype(device)), device)
        self.decoder.eval()
        return self


def is_text_model(folder: Path) -> bool:
    """Whether the folder holds a decoder and its tokenizer, as model folders do."""
    return all((folder / part).is_dir() for part in (DECODER, TOKENIZER))


def load_text_model(folder: Path) -> TextModel:
    """The decoder of a model folder, or of one that `save_text_model` made, in float32.

    Raises:
        RefragError: it holds none.
    """
    if not is_text_model(folder):
        raise ArtifactError(
            f"{folder} holds no decoder: {DECODER}/ or {TOKENIZER}/ is missing; name the content folder of a trained "
            "model, e.g. models/NAME--full/finetuned/content"
        )
    place = folder.resolve()
    recipe = DecoderRecipe(source=f"path:{place / DECODER}", tokenizer=f"path:{place / TOKENIZER}")
    # No weights are drawn: the seed is none.
    decoder, tokenizer = load_decoder(recipe, place, seed=0), load_tokenizer(recipe, place)
    return TextModel(decoder, tokenizer, folder, folder_digest(folder))


def save_text_model(decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write decoder/ and tokenizer/ into the new folder `folder`."""
    with quietly():
        decoder.save_pretrained(folder / DECODER)
    tokenizer.save_pretrained(folder / TOKENIZER)


def load_reader(project: Project, model: str, folder: Path | None) -> TextModel:
    """The reader of full text that was given; else the model's control `full`, its fine-tuned or its shipped decoder.

    Raises:
        RefragError: there is none of these.
    """
    if folder:
        return load_text_model(folder)
    for name in (control_name(model, "full"), model):
        if (project.content("finetuned", name) / SETTINGS_FILE).is_file():
            return load_text_model(project.content("finetuned", name))
    shipped = project.shipped(model)
    if shipped.is_dir():
        packed, _ = load_packed(shipped, project.recipe(model), project.recipe_path(model).parent)
        return TextModel(packed.decoder, packed.tokenizer, shipped, folder_digest(shipped))
    raise ArtifactError(
        f"no model reads full text for {model}; train its control (`controls: {{full: {{}}}}` in the recipe, then "
        f"`refrag run all --model {control_name(model, 'full')}`), or name one by --reader"
    )
