"""The steps of a recipe's training stages, without a corpus: how much each reads, and its forward pass to be looked at.

Reconstruction and CPT are the tasks themselves over windows of no text in particular. What the others read depends on
questions and passages: they are prompts of assumed lengths.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from refrag_platform.bench.arithmetic import StepWork
from refrag_platform.model.decoder import decoder_states, head_weight
from refrag_platform.model.policy import budget
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import FinetunedRecipe, PolicyRecipe, Recipe, TrainingRecipe
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.core.groups import decoder_group, encoder_groups
from refrag_platform.training.core.loop import Task
from refrag_platform.training.core.lora import prepare_decoder, prepare_encoder
from refrag_platform.training.core.losses import linear_cross_entropy
from refrag_platform.training.core.windows import Windows
from refrag_platform.training.cpt import CptTask, context_lengths, continued, repeat_lengths
from refrag_platform.training.episodes import POSITIONS_AT_ONCE
from refrag_platform.training.finetuned import LENGTH_STEP
from refrag_platform.training.policy import policy_network
from refrag_platform.training.reconstruction import ReconstructionTask

# Assumed of a question with its answer, the chat format around them included, and of the answer alone.
QUESTION_TOKENS, ANSWER_TOKENS = 96, 16


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
    """Stands for `Windows`: of a length, and of no text."""

    def __init__(self, length: int) -> None:
        self.length = length

    def batch(self, step: int, micro: int, size: int, rank: int = 0, world: int = 1) -> Tensor:
        return torch.zeros(size // world, self.length, dtype=torch.long)


def stage_steps(stage: str, recipe: Recipe, model: RefragModel, micro_size: int, world: int) -> StageSteps:
    """A stage's steps, each kind with a micro-batch of `micro_size` sequences over `world` processes."""
    if stage == "reconstruction":
        return _reconstruction(recipe, model, micro_size, world)
    if stage == "cpt" and recipe.cpt.reading is None:
        return _cpt(recipe, model, micro_size, world)
    if stage == "policy":
        return _policy(recipe, model, micro_size // world)
    return _prompts(stage, recipe, model, micro_size // world)


def _blank(lengths: dict[int, int]) -> dict[int, Windows]:
    return {key: cast(Windows, BlankWindows(length)) for key, length in lengths.items()}


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
    repeated = repeat_lengths(settings, k)
    task = CptTask(model, settings, windows, recipe.seed, repeats=_blank({n: n * k for n in repeated}))

    def key(step: int) -> Hashable:
        grows = step < task.curriculum_steps
        mixed = step >= settings.steps * (1 - settings.mixed_steps_share)
        return task.repeated_chunks(step), task.curriculum.factor(step) if grows else 0, mixed

    def work(batch: Batch) -> StepWork:
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


def _prompts(stage: str, recipe: Recipe, model: RefragModel, rows: int) -> StageSteps:
    """Fine-tuning, and a CPT that asks."""
    settings = recipe.finetuned if stage == "finetuned" else recipe.cpt
    encodes = settings.encoder_learning_rate > 0
    if encodes:
        prepare_encoder(model, settings, recipe.seed)
    else:
        model.encoder.requires_grad_(False)
    prepare_decoder(model, settings, recipe.seed)
    shapes = _finetuned_shapes(recipe, recipe.finetuned) if stage == "finetuned" else _reading_shapes(recipe)
    kinds = []
    for share, chunks, positions, predicted in shapes:
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


def _reading_shapes(recipe: Recipe) -> list[tuple[float, int, int, int]]:
    """As above; each of a step's blocks predicts its answer."""
    settings, reading = recipe.cpt, recipe.cpt.reading
    assert reading is not None
    chunks, k = settings.context_tokens // recipe.encoder.chunk_size, recipe.encoder.chunk_size
    kept = math.ceil(reading.most_share_kept * chunks) * (k - 1)
    asked = 1 + chunks + reading.blocks * reading.block_tokens
    answers, text = reading.blocks * ANSWER_TOKENS, settings.output_tokens
    return [
        (reading.steps_share * (1 - reading.kept_steps_share), chunks, asked, answers),
        (reading.steps_share * reading.kept_steps_share, chunks, asked + kept, answers),
        (1 - reading.steps_share, chunks, 1 + chunks + text, text),
    ]


def _policy(recipe: Recipe, model: RefragModel, rows: int) -> StageSteps:
    settings: PolicyRecipe = recipe.policy
    model.requires_grad_(False)
    # Its layers are copies of one, and a fake tensor can't be copied.
    with unset_fake_temporarily(), torch.device("meta"):
        policy = policy_network(settings, model.vector_dim)
    k, group = recipe.encoder.chunk_size, settings.group_size
    passages = (settings.passages + (settings.min_passages or settings.passages)) / 2
    asked = math.ceil(passages * -(-recipe.corpus.passage_tokens // k))
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
        batch = {"ids": torch.zeros(at_once, positions, dtype=torch.long)}
        kinds.append(StepKind(share, work, samples * positions, batch))

    def forward(batch: Batch) -> Tensor:
        return decoder_states(model.decoder, model.decoder.get_input_embeddings()(batch["ids"]))

    return StageSteps(kinds, policy, list(policy.parameters()), forward, (model,), learns=False)
