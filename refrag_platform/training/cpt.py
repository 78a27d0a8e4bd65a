"""Continual pre-training (section 2): the context as vectors, the next o tokens predicted; all weights train.

Every sequence begins with the token that starts a text, whichever system reads it (`segments.window_layout` says why).

The last part of the run keeps a random share of chunks as tokens, so that the model reads mixed input. Some steps may
ask for the context itself: the token that starts a text, once more after the vectors, means "repeat" there. Or most of
the steps ask what passages say (`cpt.reading`).
The same task trains the controls that read the full context, none, or the last s/k tokens, each from the untrained
decoder, or from the packed weights' where the recipe says so.
Run: `refrag run cpt --model tiny`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refrag_platform.errors import RecipeError
from refrag_platform.model.decoder import decoder_states, head_weight
from refrag_platform.model.families import require_positions
from refrag_platform.model.packed import known_positions, packed_layout, predicting_states
from refrag_platform.model.policy import budget
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import whole_chunks, window_layout
from refrag_platform.recipes import CptRecipe, TrainedSystem
from refrag_platform.stages import SHIPPED, StageContext
from refrag_platform.training.core.artifact import finish, load_model
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.core.curriculum import Curriculum
from refrag_platform.training.core.groups import decoder_group, encoder_groups, vector_std
from refrag_platform.training.core.loop import Task, train
from refrag_platform.training.core.lora import prepare_decoder, prepare_encoder
from refrag_platform.training.core.losses import linear_cross_entropy
from refrag_platform.training.core.precision import autocast
from refrag_platform.training.core.windows import WindowSampler
from refrag_platform.training.reading.batches import ContextForm, ReadingBatches
from refrag_platform.training.reading.loss import reading_loss
from refrag_platform.training.reading.sources import reading_batches
from refrag_platform.training.start import control_start, take_over_packed

# Chunks in a sample of a step that repeats its context.
REPEATED_CHUNKS = (1, 8, 32)


class CptTask(Task):
    """Next-paragraph prediction for REFRAG or one of its controls, step by step on the same windows.

    But for steps that repeat: REFRAG alone has them, and they are further text to it.
    """

    few_shapes = True

    def __init__(
        self,
        model: RefragModel,
        settings: CptRecipe,
        windows: dict[int, WindowSampler],
        seed: int,
        system: TrainedSystem = "refrag",
        repeats: dict[int, WindowSampler] | None = None,
        reading: ReadingBatches | None = None,
    ) -> None:
        """
        Args:
            reading: where steps ask about passages.
            windows: for each number of context chunks L, windows of L k + o tokens.
            repeats: for each number of chunks n that steps repeat, windows of n k tokens; needed for those steps alone.
        """
        super().__init__()
        self.model, self.settings, self.windows, self.seed, self.system = model, settings, windows, seed, system
        self.repeats, self.reading = repeats or {}, reading
        self.chunks = settings.context_tokens // model.chunk_size
        self.curriculum_steps = round(settings.curriculum_share * settings.steps) if settings.curriculum else 0
        if settings.curriculum:
            largest = min(settings.curriculum.max_factor, self.chunks)
            self.curriculum = Curriculum(
                self.curriculum_steps,
                largest,
                settings.curriculum.stages,
                dict.fromkeys(windows, 1),
                seed,
                settings.curriculum.one_chunk_share,
            )
        prepare_decoder(model, settings, seed)
        if system == "refrag":
            prepare_encoder(model, settings, seed)
        else:
            model.encoder.requires_grad_(False)
            model.projection.requires_grad_(False)

    def batch(self, step: int, micro: int, size: int, rank: int, world: int) -> Batch:
        if self.reading and is_among(step, self.reading.settings.steps_share):
            return self.reading.batch(step, micro, size, rank, world, seen_in_reading(self.system))
        if repeated := self.repeated_chunks(step):
            return self._repeat_batch(repeated, step, micro, size, rank, world)
        k, o = self.model.chunk_size, self.settings.output_tokens
        chunks = self.curriculum.factor(step) if step < self.curriculum_steps else self.chunks
        tokens = self.windows[chunks].batch(step, micro, size, rank, world)
        context = tokens[:, : chunks * k].reshape(len(tokens), chunks, k)
        # Packed, the context's own text is predicted too, from the second block on.
        output = tokens[:, o if self.settings.packed else chunks * k :]
        mixed = step >= self.settings.steps * (1 - self.settings.mixed_steps_share)
        kept = budget(chunks, self.settings.mixed_share_kept) if mixed and self.system == "refrag" else 0
        # For the rows of all ranks, each of which takes its own: the batch is that of one process.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 4096 + micro * 64)
        order = torch.rand(size, chunks, generator=generator).argsort(1)
        keep = order[rank * size // world : (rank + 1) * size // world] < kept
        token_ids, index = window_layout(context, keep, self.model.start_token_id)
        batch: Batch = {"context": context, "output": output, "token_ids": token_ids, "chunk_index": index}
        if self.settings.packed:
            # Windows that keep nothing are alike, and so is what their blocks see.
            batch["known"] = known_positions(keep if kept else keep[:1], k, o // k)
        return batch

    def repeated_chunks(self, step: int) -> int | None:
        """Chunks in a sample if this step repeats its context, else None."""
        share = self.settings.repeat_steps_share if self.repeats else 0.0
        if not is_among(step, share):
            return None
        return sorted(self.repeats)[int((step + 0.5) * share) % len(self.repeats)]

    def samples(self, step: int, size: int) -> int:
        """A step that repeats has more sequences, of about as many positions in all."""
        repeated = self.repeated_chunks(step)
        if repeated is None:
            return size
        text = self.settings.context_tokens if self.settings.packed else self.settings.output_tokens
        positions = 1 + self.chunks + text
        return size * max(1, positions // (repeated * (1 + self.model.chunk_size) + 2))

    def _repeat_batch(self, chunks: int, step: int, micro: int, size: int, rank: int, world: int) -> Batch:
        tokens = self.repeats[chunks].batch(step, micro, size, rank, world)
        context = tokens.reshape(len(tokens), chunks, self.model.chunk_size)
        start = torch.full((len(tokens), 1), self.model.start_token_id)
        token_ids, index = window_layout(
            context, torch.zeros(len(tokens), chunks, dtype=torch.bool), self.model.start_token_id
        )
        return {
            "context": context,
            "output": tokens,
            "token_ids": torch.cat([token_ids, start], 1),
            "chunk_index": torch.cat([index, torch.full_like(start, -1)], 1),
            "repeats": True,
        }

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        if self.reading and "blocks" in batch:
            return reading_loss(self.model, batch, seen_in_reading(self.system), self.reading.settings.quotes_weight)
        if self.system != "refrag":
            return self.loss(*self.control_inputs(batch)), {}
        embeds = self.chunk_embeds(batch)
        context = self.model.gather(batch["token_ids"], batch["chunk_index"], embeds)
        loss = self.loss(context, batch["output"], batch.get("known"))
        figures = {"vector_std": vector_std(self.model, embeds)}
        return loss, figures | ({"repeat_loss": loss.detach()} if "repeats" in batch else {})

    def chunk_embeds(self, batch: Batch) -> Tensor:
        """[B L, d]: what the decoder reads for every chunk of the batch; each context is a passage."""
        context = batch["context"]
        if "known" in batch and not self.model.encoder.causal:
            # Each block is a passage of its own: a vector that knew of the next ones would give away what they say.
            context = context.unflatten(1, (-1, self.settings.output_tokens // self.model.chunk_size))
        return self.model.project(self.model.encode(context, padded=False).flatten(0, -2))

    def control_inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A control's contexts as token embeddings [n, N, d], and what it predicts after each.

        Each begins with the token that starts a text, which is all of no context. Packed, each block of o tokens is a
        sequence of its own but with full context, which is one sequence for all.
        """
        context, output = batch["context"].flatten(1), batch["output"]
        kept = batch["context"].shape[1]
        if self.settings.packed:
            o = self.settings.output_tokens
            if self.system == "full":
                context = context[:, :o]
            else:
                text = torch.cat([context[:, :o], output], 1)
                context = text[:, :-o].unflatten(1, (-1, o)).flatten(0, 1)
                output = output.unflatten(1, (-1, o)).flatten(0, 1)
        if self.system == "none":
            context = context[:, :0]
        elif self.system == "truncated":
            context = context[:, -kept:]
        started = nn.functional.pad(context, (1, 0), value=self.model.start_token_id)
        return self.model.decoder.get_input_embeddings()(started), output

    def loss(self, context: Tensor, output: Tensor, known: Tensor | None = None) -> Tensor:
        """Mean loss of the tokens after a context [B, N, d]; its last position predicts the first of them.

        Args: known: of a packed batch, the context positions before each block.
        """
        decoder = self.model.decoder
        text = decoder.get_input_embeddings()(output)
        inputs = torch.cat([context.to(text.dtype), text], 1)
        if known is None:
            states = decoder_states(decoder, inputs)[:, context.shape[1] - 1 : -1].flatten(0, 1)
        else:
            layout = packed_layout(known, context.shape[1], output.shape[1] // known.shape[1])
            states = predicting_states(decoder_states(decoder, inputs, layout), layout)
        return linear_cross_entropy(states, head_weight(decoder), output.flatten())

    @torch.no_grad()
    def probe(self, batch: Batch) -> dict[str, float]:
        """The loss with the context of another window: it must be worse, or the vectors carry nothing."""
        if self.system != "refrag" or "blocks" in batch or len(batch["output"]) < 2 or "repeats" in batch:
            return {}
        with autocast(self.settings.precision, batch["output"].device):
            context = self.model.gather(batch["token_ids"], batch["chunk_index"], self.chunk_embeds(batch))
            known = batch.get("known")
            others = None if known is None else known.roll(1, 0)
            return {
                "own_loss": float(self.loss(context, batch["output"], known)),
                "shuffled_loss": float(self.loss(context.roll(1, 0), batch["output"], others)),
            }

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [*encoder_groups(self.model, self.settings), decoder_group(self.model, self.settings)]

    def counts(self, batch: Batch) -> list[int]:
        return [len(batch["answers"]), len(batch["quotes"])] if "blocks" in batch else [1]

    def positions(self, batch: Batch) -> int:
        if "blocks" in batch:
            return len(batch["blocks"]) * int(batch["length"]) + batch["blocks"].numel()
        size, chunks, k = batch["context"].shape
        o, text = self.settings.output_tokens, batch["output"].shape[1]
        context = {
            "refrag": batch["token_ids"].shape[1],
            "full": 1 + (o if self.settings.packed else chunks * k),
            "none": text // o,
            "truncated": text // o * (1 + chunks),
        }
        return size * (context[self.system] + text)


def is_among(step: int, share: float) -> bool:
    """Whether a step is one of this share of all, which are spread evenly."""
    # Half a step off: round shares and round logging intervals don't fall on the same steps.
    return int((step + 0.5) * share) != int((step - 0.5) * share)


def seen_in_reading(system: TrainedSystem) -> ContextForm:
    """What a system's decoder finds in the context of a reading task.

    Most that is asked would stand in what a shorter text lacks: controls of that kind learn on whole contexts.
    """
    return system if system in ("refrag", "none") else "full"


def cpt_task(
    model: RefragModel,
    corpus: Path,
    settings: CptRecipe,
    seed: int,
    system: TrainedSystem = "refrag",
    root: Path = Path(),
) -> CptTask:
    """The task over a corpus' training split; `root` is what the recipe's question files are relative to.

    Raises:
        RecipeError: contexts are not whole chunks, windows are longer than the decoder's positions, or packed blocks
            are shorter than what the control `truncated` reads before each.
        RefragError: the corpus is too small.
    """
    if system == "plain":
        # No question is asked that a passage could be near to: the nearest text is the last.
        system = "truncated"
    k, o = model.chunk_size, settings.output_tokens
    chunks = whole_chunks("cpt.context_tokens", settings.context_tokens, k)
    kept = budget(chunks, settings.mixed_share_kept) if settings.mixed_steps_share else 0
    read = {"full": settings.context_tokens, "none": 0}.get(system, chunks + kept * (k - 1))
    require_positions(
        model.decoder,
        # Nothing follows the last token, so its position is not needed.
        read + o,
        f"shorten cpt.context_tokens ({settings.context_tokens}) or cpt.output_tokens ({o})",
    )
    if system == "truncated" and settings.packed and o < settings.context_tokens // k:
        raise RecipeError(
            f"cpt.output_tokens is {o} in packed windows: the control `truncated` reads {settings.context_tokens // k} "
            "tokens before each block, and the first has only as many as a block; raise output_tokens"
        )
    reading = None
    if settings.reading:
        reading = reading_batches(model, corpus, settings, seed, seen_in_reading(system), root)
    windows = {
        n: WindowSampler(corpus, "train", n * k + o, seed, settings.batch_size, "cpt")
        for n in context_lengths(settings, k)
    }
    repeats = {}
    if system == "refrag" and (repeated := repeat_lengths(settings, k)):
        require_positions(
            model.decoder, 2 + max(repeated) * (1 + k), "shorten cpt.context_tokens or set cpt.repeat_steps_share: 0"
        )
        repeats = {n: WindowSampler(corpus, "train", n * k, seed) for n in repeated}
    return CptTask(model, settings, windows, seed, system, repeats, reading)


def context_lengths(settings: CptRecipe, k: int) -> set[int]:
    """Chunks of the contexts that text continues: the full length, and a curriculum's."""
    full = settings.context_tokens // k
    if not settings.curriculum:
        return {full}
    return {full} | {2**i for i in range(min(settings.curriculum.max_factor, full).bit_length())}


def repeat_lengths(settings: CptRecipe, k: int) -> list[int]:
    """Chunks of the contexts that steps repeat, if any do."""
    if not settings.repeat_steps_share:
        return []
    return [n for n in REPEATED_CHUNKS if n * k <= settings.context_tokens]


def continued(settings: CptRecipe) -> CptRecipe:
    """How a released checkpoint is trained on: its encoder as it is, contexts of their full length from the start."""
    return settings.model_copy(update={"curriculum": None, "encoder_lora_rank": None})


def train_cpt(context: StageContext) -> dict[str, Any]:
    """The stage: the reconstruction checkpoint in, every part trained to use compressed context.

    Where it continues from a released checkpoint, the encoder stays as it is, and with it the chunk store's vectors;
    contexts have their full length from the start. The release in models/NAME/release is taken over as it is.
    """
    settings, recipe = context.recipe.cpt, context.recipe
    if settings.continue_from == SHIPPED:
        return take_over_packed(context)
    if recipe.as_control:
        model = control_start(context)
    elif context.released is None:
        model = load_model(context, context.inputs["reconstruction"])
    else:
        model = load_model(context, context.released)
        model.encoder.requires_grad_(False)
        settings = continued(settings)
    corpus, root = context.inputs["corpus"], context.project.root
    task = cpt_task(model, corpus, settings, recipe.seed, recipe.system, root)
    summary = train(task, settings, context.work, f"cpt of {recipe.name}")
    return finish(context, model, summary)
