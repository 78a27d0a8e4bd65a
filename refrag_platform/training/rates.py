"""A control's learning rate: each of those that its recipe lists is tried, the best on validation questions is kept.

Chosen by the loss of answers, and never on test questions: on what is reported nothing is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch

from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import TrainingRecipe
from refrag_platform.training.core.batch import to_device
from refrag_platform.training.core.loop import Task, TrainingDiverged
from refrag_platform.training.core.lora import merge_lora

BATCHES = 16


def best_rate(
    rates: Sequence[float],
    trained: Callable[[float], tuple[RefragModel, dict[str, Any]]],
    judged: Callable[[RefragModel], float],
) -> tuple[float, RefragModel, dict[str, Any], dict[str, float]]:
    """The best of these rates, the model and summary of its training, and the loss that `judged` each.

    Raises:
        TrainingDiverged: all of them diverged.
    """
    best: tuple[float, RefragModel, dict[str, Any]] | None = None
    losses: dict[str, float] = {}
    lowest, diverged = math.inf, None
    for rate in rates:
        try:
            model, summary = trained(rate)
        except TrainingDiverged as error:
            diverged = error
            continue
        merge_lora(model)
        losses[f"{rate:g}"] = judged(model)
        if losses[f"{rate:g}"] < lowest:
            best, lowest = (rate, model, summary), losses[f"{rate:g}"]
    if best is None:
        raise diverged or TrainingDiverged(f"no learning rate has a loss on validation questions: {losses}")
    return *best, losses


@torch.no_grad()
def mean_loss(task: Task, settings: TrainingRecipe, device: torch.device) -> float:
    """Mean loss, in nats, of some batches of a training, cut as they are there; the same in every process."""
    task.to(device).eval()
    size = settings.micro_batch_size or settings.batch_size
    losses = []
    for step, micro in product(range(BATCHES), range(settings.batch_size // size)):
        batch = to_device(task.batch(step, micro, size, 0, 1), device)
        task.prepare_updates(batch)
        losses.append(task(batch)[0])
    return float(torch.stack(losses).mean())
