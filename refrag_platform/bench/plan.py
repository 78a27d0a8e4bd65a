"""What a recipe's training asks of N GPUs before anybody pays for them: memory of each, hours, cost.

Parameters, batches and what is kept for the backward pass are those of the training's own code, run over tensors
without numbers; `assumptions` says the rest. Run: `refrag plan --model llama-2-7b --gpu h100`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from refrag_platform.bench.arithmetic import DecoderSize, Passes, training_flops
from refrag_platform.bench.gpus import Gpu, Utilisation, measured_utilisation
from refrag_platform.bench.memory import compile_weightless, numberless, peak_bytes, saved_bytes
from refrag_platform.bench.steps import (
    ANSWER_TOKENS,
    OPENING_TOKENS,
    QUESTION_TOKENS,
    StageSteps,
    StepKind,
    stage_steps,
)
from refrag_platform.bench.strategy import BUCKET, LIVE, DeviceState, Strategy, device_state, strategy
from refrag_platform.bench.weightless import WeightlessModel, weightless_model
from refrag_platform.errors import RefragError
from refrag_platform.model.decoder import ROWS, head_weight, in_dtype
from refrag_platform.recipes import Recipe
from refrag_platform.training.core.ranks import micro_batch

STAGES = ("reconstruction", "cpt", "finetuned", "policy")
# Of a GPU's memory; the rest is for CUDA itself, NCCL, what the allocator can't use, and what a plan misses.
USABLE = 0.9


@dataclass(frozen=True)
class Memory(DeviceState):
    """Bytes on each GPU at the peak.

    activations: all that the backward pass of a micro-batch reads, weights rounded for it among them; without one all
    that is alive at once. logits: one block of them, and the head's gradient.
    """

    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StagePlan:
    """A stage on its GPUs. positions: of the decoder, a step, as metrics count them. seconds: of all steps."""

    stage: str
    strategy: Strategy
    micro_batch: int
    micro_steps: int
    steps: int
    trained: int
    positions: float
    step_flops: float
    utilisation: Utilisation
    memory: Memory
    seconds: float

    def cost(self, price_per_hour: float) -> float:
        """Of this stage's GPUs, at a price of each."""
        return self.seconds / 3600 * self.strategy.processes * price_per_hour


def plan(recipe: Recipe, base: Path, kind: Gpu, gpus: int | None, measured: list[Path]) -> list[StagePlan]:
    """Every stage that a recipe trains.

    Args:
        base: the recipe's folder.
        gpus: in place of the processes of each stage's accelerate config; a stage without one runs on one GPU.
        measured: results of `refrag bench train`.

    Raises:
        RefragError: it is a control's recipe, a source's shape is not to be had, a batch can't be cut for so many
            GPUs, or nothing was measured.
    """
    if recipe.system != "refrag":
        raise RefragError(f"{recipe.name} is a control; plans are of models: leave --{recipe.system} off its name")
    return [
        stage_plan(stage, recipe, base, strategy(base, stage, recipe, gpus), kind, measured)
        for stage in STAGES
        if getattr(getattr(recipe, stage), "continue_from", None) is None
        or (stage == "cpt" and recipe.cpt.continue_from != "release")
    ]


def stage_plan(stage: str, recipe: Recipe, base: Path, how: Strategy, kind: Gpu, measured: list[Path]) -> StagePlan:
    """One stage of a recipe as it is launched; arguments and errors as `plan` has them."""
    settings = getattr(recipe, stage)
    micro_size = micro_batch(settings, how.processes)
    mode = numberless()
    model = weightless_model(recipe, base, mode)
    with mode:
        steps = stage_steps(stage, recipe, model, micro_size, how.processes)
    passes, micro_steps = _passes(model, steps), settings.batch_size // micro_size
    whole = how.processes * micro_steps
    flops = whole * sum(one.share * training_flops(model, one.work, passes) for one in steps.kinds)
    positions = whole * sum(one.share * one.counted for one in steps.kinds)
    compiled = settings.compile and how.zero != 3
    memory = peak_memory(model, steps, mode, how, bf16=settings.precision == "bf16", compiled=compiled)
    reached = measured_utilisation(kind, compiled, flops / max(1.0, positions), measured)
    return StagePlan(
        stage, how, micro_size // how.processes, micro_steps, settings.steps, sum(p.numel() for p in steps.trained),
        positions, flops, reached, memory, settings.steps * flops / (how.processes * kind.peak * reached.share),
    )  # fmt: skip


def peak_memory(
    model: WeightlessModel, steps: StageSteps, mode: FakeTensorMode, how: Strategy, bf16: bool, compiled: bool
) -> Memory:
    """What is on a GPU at the peak of the micro-batch that takes most, were all of it there at once.

    Args: bf16: whether it computes in that. compiled: whether its layers are.
    """
    on_device = device_state(steps.module, steps.frozen, steps.trained, bf16, how)
    if how.zero is not None and bf16:
        in_dtype(steps.module, torch.bfloat16)
    modules = (steps.module, *steps.frozen)
    if compiled and steps.learns:
        compile_weightless(*modules)
    held = saved_bytes if steps.learns else peak_bytes
    number, size = 2 if bf16 else 4, DecoderSize.of(model.decoder)
    head_gradient = 4 * size.head * (steps.learns and head_weight(model.decoder).requires_grad)

    def at_peak(kind: StepKind) -> Memory:
        rows = min(ROWS, kind.work.sequences * kind.work.predicted)
        # In the lower precision, and in float32 what is left of each token's probability.
        logits = rows * size.head / size.width * (number + 8) + head_gradient
        activations = float(held(steps.forward, kind.batch, modules, mode, bf16))
        return Memory(**asdict(on_device), activations=activations, logits=logits)

    # What batches of the same parts hold grows with their positions.
    by_size = sorted(steps.kinds, key=lambda kind: kind.work.sequences * kind.work.positions)
    largest = {frozenset(kind.batch): kind for kind in by_size}
    return max(map(at_peak, largest.values()), key=lambda memory: memory.total)


def _passes(model: WeightlessModel, steps: StageSteps) -> Passes:
    """Whatever trains is multiplied three times; what stands before it, twice."""

    def times(module: nn.Module, frozen: int) -> int:
        return 3 if any(parameter.requires_grad for parameter in module.parameters()) else frozen

    if not steps.learns:
        return Passes(1, 1, 1, 1)
    head = 3 if head_weight(model.decoder).requires_grad else 2
    return Passes(times(model.encoder, 1), times(model.projection, 1), times(model.decoder, 2), head)


def assumptions(plans: list[StagePlan], kind: Gpu) -> list[str]:
    """What the figures rest on, a sentence each."""
    told = [
        f"{kind.name}: {kind.memory / 1e9:.0f} GB and {kind.peak / 1e12:.0f} TFLOP/s (dense bf16), as its maker says; "
        f"a stage fits where it takes at most {USABLE:.0%} of that memory.",
    ]
    for reached in dict.fromkeys(one.utilisation for one in plans):
        where = f"{reached.share:.1%} of the peak: {reached.file.name}, loop `{reached.loop}`, {reached.device}"
        told.append(where + (", one GPU." if reached.same_kind else f"; no {kind.name} was measured."))
    told += [
        "No time is counted for what crosses the network, compilation, checkpoints, or batches made too slowly. "
        "Short steps and low-rank updates of a small decoder reach less of the peak; docs/distributed.md says "
        "how much.",
        "Memory is of the tensors of the micro-batch that takes most, all parts at once; the allocator reserves more. "
        "Eager layers keep what autograd saves, compiled ones what the compiler's partitioner leaves of it.",
    ]
    if any(one.strategy.zero is not None for one in plans):
        told.append(f"DeepSpeed's buckets: {BUCKET:,} numbers; under ZeRO-3 {LIVE:,} weights are whole at once.")
    if any(one.stage != "reconstruction" for one in plans):
        told.append(
            f"finetuned, policy, cpt.reading: passages of corpus.passage_tokens, answers of {ANSWER_TOKENS} tokens. "
            f"finetuned, policy: {QUESTION_TOKENS} tokens of question, answer and chat format a prompt; passages are "
            f"read at the finest of encoder.rates. cpt.reading: {OPENING_TOKENS} tokens of instructions before them. "
            "The encoding of passages whose vectors are made once and kept isn't counted."
        )
    return told
