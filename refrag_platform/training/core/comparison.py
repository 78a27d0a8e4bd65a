"""What training did to the loss, told by the same batches before its first step and after its last.

A log's first and last lines are of other batches each: over a few steps from weights that are good already, the harder
batch decides which of them is higher, not the training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from refrag_platform.training.core.batch import SHARES, to_device
from refrag_platform.training.core.ranks import shares
from refrag_platform.training.core.speed import eager

if TYPE_CHECKING:
    from refrag_platform.training.core.loop import Task

# Spread over the steps, so that a curriculum's short and long samples are among them.
BATCHES = 4


@torch.no_grad()
def loss_of_some_batches(task: Task, run: Any, accelerator: Accelerator, steps: int, size: int) -> float | None:
    """Mean loss, in nats, of some of the batches that a training of `steps` steps takes; all processes call it.

    None where the task's loss says nothing of that kind (`Task.comparable`).

    Args:
        run: the task as the accelerator prepared it. size: sequences of a micro-batch over all processes.
    """
    if not task.comparable:
        return None
    losses = []
    for step in sorted({round(part * (steps - 1) / (BATCHES - 1)) for part in range(BATCHES)}):
        batch = task.batch(step, 0, task.samples(step, size), accelerator.process_index, accelerator.num_processes)
        its_shares = shares([task.counts(batch)], accelerator)[0]
        batch = to_device(batch, accelerator.device) | {SHARES: its_shares}
        task.prepare_updates(batch)
        with eager():
            loss, figures = run(batch)
        losses.append(torch.as_tensor(figures.get(task.judged_by, loss), device=accelerator.device).float())
    mean = torch.stack(losses).mean()
    return float(accelerator.reduce(mean, "mean")) if accelerator.num_processes > 1 else float(mean)
