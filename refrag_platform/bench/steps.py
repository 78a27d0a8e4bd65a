"""The steps of a recipe's training stages, without a corpus: how much each reads, and its forward pass to be looked at.

Reconstruction and CPT are the tasks themselves, over windows and passages of no text in particular. What the others
read depends on questions and passages: they are prompts of assumed lengths.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from refrag_platform.bench.arithmetic import StepWork
from refrag_platform.model.decoder import decoder_states, head_weight
from refrag_platform.model.encoder import ENCODED_AT_ONCE
from refrag_platform.model.policy import budget
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import FinetunedRecipe, PolicyRecipe, ReadingRecipe, Recipe, TrainingRecipe
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.core.groups import decoder_group, encoder_groups
from refrag_platform.training.core.loop import Task
from refrag_platform.training.core.lora import prepare_decoder, prepare_encoder
from refrag_platform.training.core.losses import linear_cross_entropy
from refrag_platform.training.core.windows import WindowSampler
from refrag_platform.training.cpt import CptTask, context_lengths, continued, is_among, repeat_lengths
from refrag_platform.training.episodes import POSITIONS_AT_ONCE
from refrag_platform.training.finetuned import LENGTH_STEP
from refrag_platform.training.policy import policy_network
from refrag_platform.training.reading.batches import Block, ReadingBatches
from refrag_platform.training.reading.contexts import ReadingContext, TokenizedPassage
from refrag_platform.training.reconstruction import ReconstructionTask

# Assumed of a question with its answer, the chat format around them included, and of the answer alone.
QUESTION_TOKENS, ANSWER_TOKENS = 96, 16
# Of the instructions that stand before passages.
OPENING_TOKENS = 16


@dataclass(frozen=True)
class StepKind:
    """Steps that are alike: their share of all, and a micro-batch of one process.

    counted: its decoder positions, as the task counts them. batch: for the stage's `forward`.
    """

    share: float
    work: StepWork
    counted: int
    batch: Batch = field(repr=False)


@dataclass(frozen=True)
class StageSteps:
    """module: what the optimizer and the strategy are given. frozen: what is on the device beside it.

    forward: a micro-batch, whose backward pass follows if `learns`; where not, the decoder is asked and no more.
    """

    kinds: list[StepKind]
    module: nn.Module
    trained: list[nn.Parameter]
    forward: Callable[[Batch], Any]
    frozen: tuple[nn.Module, ...] = ()
    learns: bool = True


class BlankWindows:
    """Stands for `WindowSampler`: of a length, and of no text."""

    def __init__(self, length: int) -> None:
        self.length = length

    def batch(self, step: int, micro: int, size: int, rank: int = 0, world: int = 1) -> Tensor:
        return torch.zeros(size // world, self.length, dtype=torch.long)


class BlankReading(ReadingBatches):
    """Stands for `ReadingBatches`: equal passages fill each context, and every block has an answer."""

    def __init__(self, recipe: Recipe, settings: ReadingRecipe, window_chunks: int) -> None:
        self.settings, self._seed, self._rates = settings, recipe.seed, recipe.encoder.rates
        self._chunk_size, self._window_chunks = recipe.encoder.chunk_size, window_chunks
        self._chunks = recipe.cpt.context_tokens // self._chunk_size
        self._opening = [0] * OPENING_TOKENS
        self._passage = TokenizedPassage("", [0] * min(recipe.corpus.passage_tokens, recipe.cpt.context_tokens))

    def _draw(self, chance: np.random.Generator, rate: int) -> ReadingContext:
        size = -(-len(self._passage.token_ids) // (self._chunk_size * rate))
        return ReadingContext([self._passage] * (self._chunks // rate // size), [])

    def blocks(self, context: ReadingContext, chance: np.random.Generator) -> list[Block]:
        size = self.settings.block_tokens
        return [Block([0] * size, max(1, size - ANSWER_TOKENS), is_quote=False)] * self.settings.blocks


def stage_steps(stage: str, recipe: Recipe, model: RefragModel, micro_size: int, world: int) -> StageSteps:
    """A stage's steps, each kind with a micro-batch of `micro_size` sequences over `world` processes."""
    if stage == "reconstruction":
        return _reconstruction(recipe, model, micro_size, world)
    if stage == "cpt":
        return _cpt(recipe, model, micro_size, world)
    if stage == "policy":
        return _policy(recipe, model, micro_size // world)
    return _finetuned(recipe, model, micro_size // world)


def _blank(lengths: dict[int, int]) -> dict[int, WindowSampler]:
    return {key: cast(WindowSampler, BlankWindows(length)) for key, length in lengths.items()}


def _reconstruction(recipe: Recipe, model: RefragModel, micro_size: int, world: int) -> StageSteps:
    settings, k = recipe.reconstruction, model.chunk_size
    factors = [2**i for i in range(settings.curriculum.max_factor.bit_length())]
    task = ReconstructionTask(model, settings, _blank({f: f * k for f in factors}), recipe.seed)

    def work(batch: Batch) -> StepWork:
        rows, tokens = batch["tokens"].shape
        chunks = tokens // k
        return StepWork(rows, chunks, chunks, 1 + chunks + tokens, tokens)

    return _of_task(task, settings, task.curriculum.factor, work, micro_size, world)


def _cpt(recipe: Recipe, model: RefragModel, micro_size: int, world: int) -> StageSteps:
    settings, k = recipe.cpt, model.chunk_size
    if settings.continue_from:
        model.encoder.requires_grad_(False)
        settings = continued(settings)
    windows = _blank({n: n * k + settings.output_tokens for n in context_lengths(settings, k)})
    repeats = _blank({n: n * k for n in repeat_lengths(settings, k)})
    reading = BlankReading(recipe, settings.reading, model.encoder.window_chunks) if settings.reading else None
    task = CptTask(model, settings, windows, recipe.seed, repeats=repeats, reading=reading)

    def key(step: int) -> Hashable:
        if reading and is_among(step, reading.settings.steps_share):
            rate, kept = reading.rate_and_kept(step)
            return rate, kept > 0
        grows = step < task.curriculum_steps
        mixed = step >= settings.steps * (1 - settings.mixed_steps_share)
        return task.repeated_chunks(step), task.curriculum.factor(step) if grows else 0, mixed

    def work(batch: Batch) -> StepWork:
        if "blocks" in batch:
            rows, vectors, _ = batch["chunks"].shape
            judged, asked = len(batch["answers"]) / rows, batch["blocks"][0].numel()
            return StepWork(rows, batch["windows"].shape[1], vectors, batch["length"] + asked, judged)
        rows, read, _ = batch["context"].shape
        text = batch["output"].shape[1]
        return StepWork(rows, read, read, batch["token_ids"].shape[1] + text, text)

    return _of_task(task, settings, key, work, micro_size, world)


def _of_task(
    task: Task,
    settings: TrainingRecipe,
    key: Callable[[int], Hashable],
    work: Callable[[Batch], StepWork],
    micro_size: int,
    world: int,
) -> StageSteps:
    """Args: key: what decides the shapes of a step."""
    counts: Counter[Hashable] = Counter()
    first: dict[Hashable, int] = {}
    for step in range(settings.steps):
        kind = key(step)
        counts[kind] += 1
        first.setdefault(kind, step)
    kinds = []
    for kind, step in first.items():
        # Its numbers decide where kept chunks stand.
        with unset_fake_temporarily():
            batch = task.batch(step, 0, task.samples(step, micro_size), 0, world)
        kinds.append(StepKind(counts[kind] / settings.steps, work(batch), task.positions(batch), batch))
    trained = [p for group in task.parameter_groups() for p in group["params"]]
    return StageSteps(kinds, task, trained, task)


def _finetuned(recipe: Recipe, model: RefragModel, rows: int) -> StageSteps:
    settings = recipe.finetuned
    encodes = settings.encoder_learning_rate > 0
    if encodes:
        prepare_encoder(model, settings, recipe.seed)
    else:
        model.encoder.requires_grad_(False)
    prepare_decoder(model, settings, recipe.seed)
    kinds = []
    for share, chunks, positions, predicted in _finetuned_shapes(recipe, settings):
        work = StepWork(rows, chunks if encodes else 0, chunks, positions, predicted)
        ids = torch.zeros(rows, positions, dtype=torch.long)
        batch = {"ids": ids, "chunks": torch.zeros(rows, chunks, model.chunk_size, dtype=torch.long), "last": predicted}
        kinds.append(StepKind(share, work, ids.numel(), batch))

    def forward(batch: Batch) -> Tensor:
        chunks, ids = batch["chunks"], batch["ids"]
        if encodes:
            vectors = model.encode(chunks, padded=False).flatten(0, 1)
        else:
            vectors = model.projection.inner.weight.new_empty(chunks.shape[0] * chunks.shape[1], model.vector_dim)
        states = decoder_states(model.decoder, model.gather(ids, torch.zeros_like(ids), model.project(vectors)))
        predicting, labels = states[:, -batch["last"] :].flatten(0, 1), ids[:, -batch["last"] :].flatten()
        return linear_cross_entropy(predicting, head_weight(model.decoder), labels)

    groups = [*encoder_groups(model, settings), decoder_group(model, settings)]
    return StageSteps(kinds, model, [p for group in groups for p in group["params"]], forward)


def _finetuned_shapes(recipe: Recipe, settings: FinetunedRecipe) -> list[tuple[float, int, int, int]]:
    """(share of the steps, chunks, positions, predicted positions) of a prompt; it is padded to its batch's longest."""
    k = recipe.encoder.chunk_size
    kept = settings.most_share_kept if settings.kept_prompts_share else 0.0

    def positions(chunks: int, text: int) -> int:
        return -(-(text + chunks + math.ceil(kept * chunks) * (k - 1)) // LENGTH_STEP) * LENGTH_STEP

    shapes, each = [], (1 - settings.text_share) / settings.max_passages
    for passages in range(1, settings.max_passages + 1):
        chunks = passages * -(-recipe.corpus.passage_tokens // k)
        shapes.append((each, chunks, positions(chunks, QUESTION_TOKENS), ANSWER_TOKENS))
    if settings.text_share:
        chunks, output = settings.context_tokens // k, settings.output_tokens
        shapes.append((settings.text_share, chunks, positions(chunks, 1 + output), output))
    return shapes


def _policy(recipe: Recipe, model: RefragModel, rows: int) -> StageSteps:
    settings: PolicyRecipe = recipe.policy
    model.requires_grad_(False)
    # Its layers are copies of one, and a fake tensor can't be copied.
    with unset_fake_temporarily(), torch.device("meta"):
        policy = policy_network(settings, model.vector_dim)
    k, group = recipe.encoder.chunk_size, settings.group_size
    passages = (settings.passages + (settings.min_passages or settings.passages)) / 2
    passage = -(-recipe.corpus.passage_tokens // k)
    asked = math.ceil(passages * passage)
    # Evidence takes the first steps; it asks no decoder.
    evidence = settings.evidence_steps / settings.steps
    shares = {"evidence": evidence, "asked": (1 - evidence) * settings.question_share}
    shares["windows"] = 1 - sum(shares.values())
    kinds = []
    for name, share in shares.items():
        if share <= 1e-9:
            continue
        chunks, text = (settings.context_tokens // k, settings.output_tokens) if name == "windows" else (asked, 0)
        predicted = text or ANSWER_TOKENS
        positions = (text or QUESTION_TOKENS) + 1 + chunks + budget(chunks, settings.share_kept) * (k - 1)
        samples = 0 if name == "evidence" else rows * group
        # The encoder reads an episode once, whatever the samples.
        encoded = chunks / group if samples else chunks
        work = StepWork(samples or rows, encoded, encoded, positions if samples else 0, predicted if samples else 0)
        at_once = max(1, min(samples, POSITIONS_AT_ONCE // positions))
        count, length = (rows, chunks) if name == "windows" else (rows * settings.passages, passage)
        shape = (min(count, max(1, ENCODED_AT_ONCE // length)), length, k)
        batch = {
            "passages": torch.zeros(shape, dtype=torch.long),
            "ids": torch.zeros(at_once, positions, dtype=torch.long),
        }
        kinds.append(StepKind(share, work, samples * positions, batch))

    def forward(batch: Batch) -> None:
        model.encode(batch["passages"], padded=True)
        decoder_states(model.decoder, model.decoder.get_input_embeddings()(batch["ids"]))

    return StageSteps(kinds, policy, list(policy.parameters()), forward, (model,), learns=False)
