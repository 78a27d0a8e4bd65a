"""The one training loop: any stage, any number of processes, resumable, stopped cleanly by a signal.

A stage brings a `Task`: a module whose forward is the loss of a batch, and batches decided by the step
alone. The loop owns the optimizer, the schedule, precision, accumulation, metrics and checkpoints.
"""

from __future__ import annotations

import math
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from refrag_platform.agreement import refuse_other_training
from refrag_platform.errors import Paused, RefragError
from refrag_platform.progress import Progress
from refrag_platform.recipes import TrainingRecipe
from refrag_platform.training.core import checkpoint
from refrag_platform.training.core.batch import SHARES, Batch, pinned, to_device
from refrag_platform.training.core.comparison import loss_of_some_batches
from refrag_platform.training.core.metrics import MetricsLog
from refrag_platform.training.core.prefetch import made_by_workers, prefetch
from refrag_platform.training.core.ranks import (
    gather_weights,
    is_sharded,
    make_accelerator,
    micro_batch,
    prepare,
    refuse_other_weights,
    shares,
    world_size,
)
from refrag_platform.training.core.speed import compile_regions, eager, fast_kernels

# Standard deviation over chunks of what the decoder reads, in units of its embeddings' root mean square; 0.15 is
# healthy at the start, and a collapsed encoder measures 0.015.
COLLAPSED = 0.03


class TrainingInterrupted(Paused):
    """A signal asked the run to stop; its state was saved."""


class TrainingDiverged(RefragError):
    """The loss is not finite, or the chunk vectors have collapsed to a constant."""


class Task(nn.Module, ABC):
    """What a stage trains. `forward(batch)` returns the mean loss and figures to log (tensors or floats)."""

    updates_per_batch = 1
    # The figure whose first and last values a run is judged by.
    judged_by = "loss"
    # Whether the same batches have a lower loss after training that went well (core/comparison.py).
    comparable = True
    # Whether it makes sense to give each process a part of the weights alone.
    shardable = True
    # Whether batches come in so few shapes that on a GPU each is worth a compilation.
    few_shapes = False

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Mean loss of a batch, and figures to log."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters with their peak learning rates: [{"name": "decoder", "params": [...], "lr": peak}]."""

    @abstractmethod
    def batch(self, step: int, micro: int, size: int, rank: int, world: int) -> Batch:
        """CPU tensors of micro-batch `micro` of a step; `size` sequences over all ranks."""

    def frozen(self) -> Sequence[nn.Module]:
        """Models that are read but not trained: on the device and compiled like the task, in no checkpoint."""
        return ()

    def samples(self, step: int, size: int) -> int:
        """Sequences in a micro-batch of this step; a curriculum gives more short ones."""
        return size

    def prepare_updates(self, batch: Batch) -> None:
        """Called once a batch, before its updates, without gradients: the policy draws its samples here."""

    def probe(self, batch: Batch) -> dict[str, float]:
        """Figures that cost a further forward pass, on logged steps only."""
        return {}

    def counts(self, batch: Batch) -> list[int]:
        """Of how many things each part of the loss is the mean, where batches differ in it.

        The task multiplies each part by `share(batch, number of the part)`, which counts over micro-batches and ranks.
        """
        return [1]

    @abstractmethod
    def positions(self, batch: Batch) -> int:
        """Decoder positions of a batch, for the rate."""


def learning_rate_factor(step: int, settings: TrainingRecipe) -> float:
    """Linear warm-up, then a cosine to `final_learning_rate_share`: the share of the peak at a step."""
    warmup = max(1, round(settings.warmup_share * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    floor = settings.final_learning_rate_share
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(
    task: Task,
    settings: TrainingRecipe,
    work: Path,
    description: str,
    stop_after: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train to `settings.steps` and return the deterministic summary of the run.

    Resumes from the newest complete checkpoint under `work`. Metrics go to work/metrics.jsonl.

    Args:
        stop_after: stop, saved, after this many steps of this call (runs of limited time).
        on_step: called with the number of finished steps.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM came, or `stop_after` was reached; the state is saved.
        TrainingDiverged: the loss is not finite or the chunk vectors collapsed.
        RefragError: the decoder is of a family that would be trained wrong (agreement.py).
    """
    world = world_size()
    micro_size = micro_batch(settings, world)
    micro_steps = settings.batch_size // micro_size
    checkpoints = work / checkpoint.FOLDER
    accelerator = make_accelerator(settings, micro_size, micro_steps, checkpoint.converted(checkpoints))
    groups = [group for group in task.parameter_groups() if group["params"]]
    peaks = {group["name"]: group["lr"] for group in groups}
    if not any(peaks.values()):
        raise RefragError(
            f"{description}: nothing would be trained: the learning rates of {', '.join(peaks) or 'no parameters'} are "
            "0; raise a learning rate in the recipe's section"
        )
    optimizer: Any = torch.optim.AdamW(
        [{"params": group["params"], "lr": group["lr"]} for group in groups],
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=accelerator.device.type == "cuda",
    )
    on_gpu = accelerator.device.type == "cuda"
    modules, sharded = (task, *task.frozen()), is_sharded(accelerator)
    if sharded and not task.shardable:
        raise RefragError(
            f"{description}: what is trained is too small to be worth sharding; name ../accelerate/ddp.yaml, say, not "
            f"{settings.accelerate_config}"
        )
    # Sharded weights may be more than a device holds: DeepSpeed takes each rank's part there.
    for model in modules[1:] if sharded else modules:
        model.to(accelerator.device)
    refuse_other_training(*modules)
    if settings.compile and on_gpu and not sharded:
        compile_regions(*modules, few_shapes=task.few_shapes)
    module, optimizer = prepare(accelerator, task, optimizer)
    facts = checkpoint.resume(accelerator, checkpoints) or {"step": 0, "first_loss": None}
    step, first_loss = facts["step"], facts["first_loss"]
    log = MetricsLog(work / "metrics.jsonl", step, facts.get("pending", []), accelerator)
    started_at, loss_value = step, facts.get("last_loss")

    def compared() -> float | None:
        with fast_kernels(*modules, on_gpu=on_gpu):
            return loss_of_some_batches(task, module, accelerator, settings.steps, micro_size)

    loss_before = facts.get("loss_before") if step else compared()

    def make(number: int) -> list[Batch]:
        size = task.samples(number, micro_size)
        return [task.batch(number, micro, size, accelerator.process_index, world) for micro in range(micro_steps)]

    # Before the device has work of this process: a fork copies whatever locks are held.
    steps, workers = range(started_at, settings.steps), getattr(settings, "workers", 0)
    made_ahead = made_by_workers(make, steps, workers) if workers else map(make, steps)

    def batches() -> Iterator[list[Batch]]:
        for micro_batches in made_ahead:
            yield [pinned(batch) for batch in micro_batches] if on_gpu else micro_batches

    def save() -> None:
        kept = {"first_loss": first_loss, "last_loss": loss_value, "loss_before": loss_before, "pending": log.pending()}
        checkpoint.save(accelerator, checkpoints, step, kept, settings.keep_checkpoints)

    with (
        fast_kernels(*modules, on_gpu=on_gpu),
        _stop_on_signal() as stopped,
        prefetch(batches()) as source,
        Progress(description, settings.steps, "steps", start=step, shown=accelerator.is_main_process) as progress,
    ):
        for micro_batches in source:
            factor = learning_rate_factor(step, settings)
            rates = {name: peak * factor for name, peak in peaks.items()}
            for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
                group["lr"] = rate
            logged = (step + 1) % settings.log_every == 0 or step + 1 in (1, settings.steps)
            # Before the step: after it the batch is no longer unseen, and the figures would flatter.
            probe = {}
            if logged:
                probe = _probe(task, module if sharded else None, to_device(micro_batches[0], accelerator.device))
            total, figures, positions = _step(task, module, optimizer, accelerator, micro_batches, settings)
            step += 1
            log.count(total, figures, positions * world)
            if logged:
                line = log.write(step, rates, probe)
                loss_value = line[task.judged_by]
                first_loss = loss_value if first_loss is None else first_loss
                _refuse_divergence(line, description)
                progress.update(0, f"loss {line['loss']:.4f}")
            progress.update()
            if on_step:
                on_step(step)
            limit = stop_after is not None and step - started_at >= stop_after and step < settings.steps
            if _any_rank(stopped["signal"] != 0 or limit, accelerator):
                save()
                reason = f"signal {stopped['signal']}" if stopped["signal"] else f"{stop_after} steps"
                raise TrainingInterrupted(
                    f"{description}: stopped by {reason} after step {step}; saved, run it again to continue"
                )
            if step % settings.save_every == 0 and step < settings.steps:
                save()
        # What comes after the last step may be stopped as well, and costs no step then.
        save()
    refuse_other_weights(accelerator, task)
    summary = {"steps": step, "first_loss": first_loss, "last_loss": loss_value, "last": log.last}
    # A checkpoint of before there was such a figure has none.
    if loss_before is not None:
        summary |= {"loss_before": loss_before, "loss_after": compared()}
    gather_weights(accelerator, task, module)
    return summary


def _step(
    task: Task,
    run: Any,
    optimizer: Any,
    accelerator: Accelerator,
    micro_batches: list[Batch],
    settings: TrainingRecipe,
) -> tuple[Tensor, dict[str, Any], int]:
    """One optimizer step (or `updates_per_batch` of them on the same batch)."""
    losses: list[Tensor] = []
    figures: dict[str, Any] = {}
    positions = 0
    on_device = [to_device(batch, accelerator.device) for batch in micro_batches]
    for batch in on_device:
        task.prepare_updates(batch)
        positions += task.positions(batch)
    for batch, its_shares in zip(
        on_device, shares([task.counts(batch) for batch in micro_batches], accelerator), strict=True
    ):
        batch[SHARES] = its_shares
    for _ in range(task.updates_per_batch):
        losses.clear()
        for batch in on_device:
            with accelerator.accumulate(run):
                loss, figures = run(batch)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(run.parameters(), settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    return torch.stack(losses).mean(), figures, positions


def _refuse_divergence(line: dict[str, Any], description: str) -> None:
    """Stop as soon as a run can no longer become useful."""
    if not math.isfinite(line["loss"]):
        raise TrainingDiverged(
            f"{description}: the loss is {line['loss']} at step {line['step']}; lower the learning rates"
        )
    if line.get("vector_std", 1.0) < COLLAPSED:
        raise TrainingDiverged(
            f"{description}: the chunk vectors collapsed at step {line['step']}: their standard deviation over chunks "
            f"is {line['vector_std']:.4f} of an embedding's size, below {COLLAPSED}; lower encoder_learning_rate and "
            "projection_learning_rate, or set encoder.token_skip: true"
        )


def _probe(task: Task, run: Any, batch: Batch) -> dict[str, float]:
    """A probe is rare: a graph of its own would cost more to compile than it saves.

    Args: run: the task as it was prepared, if it is sharded: only a pass of that gathers its weights.
    """
    with eager():
        if run is None:
            return task.probe(batch)
        task.forward = task.probe  # type: ignore[method-assign, assignment]
        try:
            return run(batch)
        finally:
            del task.forward


def _any_rank(flag: bool, accelerator: Accelerator) -> bool:
    """Whether any process raised the flag: all of them stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


@contextmanager
def _stop_on_signal() -> Iterator[dict[str, int]]:
    """SIGINT and SIGTERM ask for a stop at the end of the step; a second one acts at once."""
    state = {"signal": 0}

    def handler(number: int, frame: FrameType | None) -> None:
        if state["signal"]:
            raise KeyboardInterrupt
        state["signal"] = number

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # Not the main thread: signals can't be handled here.
        yield state
        return
    try:
        yield state
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
