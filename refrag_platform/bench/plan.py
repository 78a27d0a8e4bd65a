"""What a recipe's training asks of N GPUs before anybody pays for them: memory of each, hours, cost.

Parameters, batches and what is kept for the backward pass are those of the training's own code, run over tensors
without numbers; `assumptions` says the rest. Run: `refrag plan --model llama-2-7b --gpu h100`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from refrag_platform.bench.arithmetic import DecoderSize, Passes, linear_weights, training_flops
from refrag_platform.bench.gpus import Gpu, Utilisation, measured_utilisation
from refrag_platform.bench.steps import ANSWER_TOKENS, QUESTION_TOKENS, StageSteps, stage_steps
from refrag_platform.bench.strategy import BUCKET, LIVE, State, Strategy, device_state, strategy
from refrag_platform.bench.weightless import WeightlessModel, weightless_model
from refrag_platform.errors import RefragError
from refrag_platform.model.decoder import ROWS, head_weight, in_dtype
from refrag_platform.recipes import Recipe
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.core.ranks import micro_batch

STAGES = ("reconstruction", "cpt", "finetuned", "policy")
# Of a GPU's memory; the rest is for CUDA itself, NCCL, what the allocator can't use, and what a plan misses.
USABLE = 0.9


@dataclass(frozen=True)
class Memory(State):
    """Bytes on each GPU at the peak.

    activations: all that the backward pass of a micro-batch reads, and weights rounded for it. logits: one block of
    them, and the head's gradient.
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
    mode = FakeTensorMode(allow_non_fake_inputs=True)
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
    """What is on a GPU at the peak of a stage's largest micro-batch, were all of it there at once.

    Args: bf16: whether it computes in that. compiled: layers keep the inputs and outputs of their matrix products, and
        make the rest again.
    """
    on_device = device_state(steps.module, steps.frozen, steps.trained, bf16, how)
    if how.zero is not None and bf16:
        in_dtype(steps.module, torch.bfloat16)
    largest = max(steps.kinds, key=lambda kind: kind.work.sequences * kind.work.positions)
    passing = forward_pass(steps, largest.batch, mode, bf16)
    number, size = 2 if bf16 else 4, DecoderSize.of(model.decoder)
    rows = min(ROWS, largest.work.sequences * largest.work.predicted)
    # In the lower precision, and in float32 what is left of each token's probability.
    logits = rows * size.head / size.width * (number + 8)
    if not steps.learns:
        return Memory(**asdict(on_device), activations=passing.widest * number, logits=logits)
    trains_head = head_weight(model.decoder).requires_grad
    activations = float(passing.saved)
    if compiled:
        rounded = 2 * linear_weights(steps.module) if bf16 and how.zero is None else 0
        activations = min(activations, passing.products * number + rounded)
    return Memory(**asdict(on_device), activations=activations, logits=logits + 4 * size.head * trains_head)


@dataclass(frozen=True)
class Passing:
    """A forward pass: bytes saved for the backward pass, numbers that enter or leave matrix products, most at one."""

    saved: int
    products: int
    widest: int


def forward_pass(steps: StageSteps, batch: Batch, mode: FakeTensorMode, bf16: bool) -> Passing:
    """What a micro-batch leaves for its backward pass, in a forward pass without numbers."""
    modules = (steps.module, *steps.frozen)
    constant = {_key(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
    saved: dict[int, UntypedStorage] = {}
    products: dict[int, tuple[UntypedStorage, int]] = {}
    widest = 0

    def keep(tensor: Tensor) -> Tensor:
        if _key(tensor) not in constant:
            saved[_key(tensor)] = tensor.untyped_storage()
        return tensor

    def multiplied(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal widest
        if isinstance(layer, nn.Linear):
            widest = max(widest, inputs[0].numel() + output.numel())
            for tensor in (inputs[0], output):
                # The storage is held, or its place would be another's.
                products[_key(tensor)] = tensor.untyped_storage(), tensor.numel()

    hooks = [part.register_forward_hook(multiplied) for module in modules for part in module.modules()]
    try:
        with (
            mode,
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.set_grad_enabled(steps.learns),
        ):
            steps.forward({name: _fake(value, mode) for name, value in batch.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return Passing(sum(part.nbytes() for part in saved.values()), sum(n for _, n in products.values()), widest)


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


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
        "Memory is of the largest micro-batch, all parts at once; eager layers keep what autograd saves, compiled ones "
        "the inputs and outputs of their matrix products.",
    ]
    if any(one.strategy.zero is not None for one in plans):
        told.append(f"DeepSpeed's buckets: {BUCKET:,} numbers; under ZeRO-3 {LIVE:,} weights are whole at once.")
    if any(one.stage != "reconstruction" for one in plans):
        told.append(
            f"finetuned, policy, cpt.reading: passages of corpus.passage_tokens, {QUESTION_TOKENS} tokens of question, "
            f"answer and chat format, {ANSWER_TOKENS} of them the answer, read at the finest of "
            "encoder.rates; vectors that are made once aren't counted."
        )
    return told
