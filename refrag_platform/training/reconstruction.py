"""Reconstruction (section 2): from the vectors of x_1..x_s predict x_1..x_s, the decoder frozen unless the recipe says.

All m vectors come first and then the text, in ONE sequence: [e_1..e_m, E(x_1)..E(x_mk-1)]; the last vector's
position predicts x_1. Before them stands the token that starts a text (`segments.window_layout` says why).
Run: `refrag run reconstruction --model tiny`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refrag_platform.model.backbone import embedding_weight
from refrag_platform.model.decoder import decoder_states, head_weight
from refrag_platform.model.families import require_positions
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import ReconstructionRecipe
from refrag_platform.stages import SHIPPED, StageContext
from refrag_platform.training.core.artifact import finish, take_over
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.core.curriculum import Curriculum
from refrag_platform.training.core.groups import decoder_group, encoder_groups, vector_std
from refrag_platform.training.core.loop import Task, train
from refrag_platform.training.core.lora import prepare_decoder, prepare_encoder
from refrag_platform.training.core.losses import linear_cross_entropy
from refrag_platform.training.core.precision import autocast
from refrag_platform.training.core.windows import WindowSampler
from refrag_platform.training.start import take_over_packed

HELPER_CHUNKS = 512


class ReconstructionTask(Task):
    """Encoder and projection learn to carry the text; helper heads that read it off the vectors fade out."""

    # The helper's loss fades by plan: that the sum of both fell would say nothing.
    judged_by = "reconstruction_loss"

    few_shapes = True

    def __init__(
        self, model: RefragModel, settings: ReconstructionRecipe, windows: dict[int, WindowSampler], seed: int
    ) -> None:
        """Args: windows: for each factor f, windows of f k tokens."""
        super().__init__()
        self.model, self.settings, self.windows = model, settings, windows
        if settings.train_decoder:
            prepare_decoder(model, settings, seed)
        else:
            model.decoder.requires_grad_(False)
        prepare_encoder(model, settings, seed)
        width = embedding_weight(model.decoder).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.helper = nn.Linear(width, model.chunk_size * width, bias=False)
        curriculum = settings.curriculum
        samples = {factor: curriculum.max_factor // factor for factor in windows}
        self.curriculum = Curriculum(
            settings.steps, curriculum.max_factor, curriculum.stages, samples, seed, curriculum.one_chunk_share
        )

    def samples(self, step: int, size: int) -> int:
        """`size` counts sequences of the largest factor; shorter ones fill the same number of tokens."""
        return size * self.settings.curriculum.max_factor // self.curriculum.factor(step)

    def batch(self, step: int, micro: int, size: int, rank: int, world: int) -> Batch:
        factor = self.curriculum.factor(step)
        fade = max(1.0, self.settings.helper_loss_share * self.settings.steps)
        weight = self.settings.helper_loss_weight * max(0.0, 1.0 - step / fade)
        tokens = self.windows[factor].batch(step, micro, size, rank, world)
        chunks = tokens.view(-1, self.model.chunk_size)
        chosen = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(step))[:HELPER_CHUNKS]
        return {
            "tokens": tokens,
            "chosen": chosen,
            "helper_weight": torch.tensor(weight),
            "helper": weight > 0,
        }

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        tokens = batch["tokens"]
        embeds = self.chunk_embeds(tokens)
        loss = self.text_loss(embeds, tokens)
        figures = {"vector_std": vector_std(self.model, embeds), "reconstruction_loss": loss.detach()}
        if batch["helper"]:
            helper = self.helper_loss(embeds, tokens.reshape(-1, self.model.chunk_size), batch["chosen"])
            figures["helper_loss"] = helper.detach()
            loss = loss + batch["helper_weight"] * helper
        else:
            # Under DDP every parameter must be part of every step's graph.
            loss = loss + 0.0 * self.helper.weight.sum()
        return loss, figures

    def chunk_embeds(self, tokens: Tensor) -> Tensor:
        """[B m, d]: what the decoder reads for the chunks of texts [B, m k], each of which is a passage."""
        passages = tokens.unflatten(1, (-1, self.model.chunk_size))
        return self.model.project(self.model.encode(passages, padded=False).flatten(0, 1))

    def text_loss(self, embeds: Tensor, tokens: Tensor) -> Tensor:
        """Mean loss of the text after its vectors; embeds [B m, d], tokens [B, m k]."""
        hidden, labels = self.text_states(embeds, tokens)
        return linear_cross_entropy(hidden, head_weight(self.model.decoder), labels)

    def text_states(self, embeds: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states that predict the text [B m k, d], and the text [B m k]."""
        batch, length = tokens.shape
        chunks = length // self.model.chunk_size
        start = torch.full_like(tokens[:, :1], self.model.start_token_id)
        first, text = self.model.decoder.get_input_embeddings()(torch.cat([start, tokens], 1)).split([1, length], 1)
        inputs = torch.cat([first, embeds.view(batch, chunks, -1).to(text.dtype), text], 1)
        hidden = decoder_states(self.model.decoder, inputs)
        return hidden[:, chunks : chunks + length].flatten(0, 1), tokens.flatten()

    def helper_loss(self, embeds: Tensor, chunks: Tensor, chosen: Tensor) -> Tensor:
        """Token ids read off some vectors by one linear head per position.

        Of their direction alone: heads that see the size reward ever larger vectors, which a decoder can't change.
        """
        width = embeds.shape[1]
        states = self.helper(nn.functional.rms_norm(embeds[chosen].float(), (width,)))
        table = self.model.encoder.decoder_embeddings * width**-0.5
        return linear_cross_entropy(states.view(-1, width), table, chunks[chosen].flatten())

    @torch.no_grad()
    def probe(self, batch: Batch) -> dict[str, float]:
        """The loss with every sample's vectors taken from another sample: what the text alone would give."""
        tokens = batch["tokens"]
        if len(tokens) < 2:
            return {}
        with autocast(self.settings.precision, tokens.device):
            embeds = self.chunk_embeds(tokens)
            others = embeds.view(len(tokens), -1, embeds.shape[-1]).roll(1, 0).flatten(0, 1)
            return {
                "own_loss": float(self.text_loss(embeds, tokens)),
                "shuffled_loss": float(self.text_loss(others, tokens)),
            }

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = [*encoder_groups(self.model, self.settings), decoder_group(self.model, self.settings)]
        helper = {"name": "helper", "params": list(self.helper.parameters())}
        return [*groups, helper | {"lr": self.settings.projection_learning_rate}]

    def positions(self, batch: Batch) -> int:
        tokens = batch["tokens"].numel()
        return len(batch["tokens"]) + tokens + tokens // self.model.chunk_size


def reconstruction_task(
    model: RefragModel, corpus: Path, settings: ReconstructionRecipe, seed: int
) -> ReconstructionTask:
    """The task over a corpus' training split.

    Raises:
        RecipeError: samples are longer than the decoder's positions.
        RefragError: the corpus is too small.
    """
    most, k = settings.curriculum.max_factor, model.chunk_size
    require_positions(model.decoder, 1 + most * (1 + k), f"lower reconstruction.curriculum.max_factor ({most})")
    factors = [2**i for i in range(most.bit_length())]
    size = settings.batch_size
    windows = {f: WindowSampler(corpus, "train", f * k, seed, size, "reconstruction") for f in factors}
    return ReconstructionTask(model, settings, windows, seed)


def train_reconstruction(context: StageContext) -> dict[str, Any]:
    """The stage: an untrained model in, encoder and projection trained, the decoder as the recipe says.

    Where it continues from a released checkpoint or the release, that is taken over: cpt trains on from there.
    """
    if context.recipe.reconstruction.continue_from == SHIPPED:
        return take_over_packed(context)
    if context.released is not None:
        return take_over(context, context.released)
    base = context.project.recipe_path(context.recipe.name).parent
    model = RefragModel.create(context.recipe, base)
    settings = context.recipe.reconstruction
    task = reconstruction_task(model, context.inputs["corpus"], settings, context.recipe.seed)
    summary = train(task, settings, context.work, f"reconstruction of {context.recipe.name}")
    return finish(context, model, summary)
