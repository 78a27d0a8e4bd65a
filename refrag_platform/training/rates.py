"""A control's learning rate: each of those that its recipe lists is tried, the best on validation questions is kept.

Chosen by the loss of answers, and never on test questions: on what is reported nothing is chosen.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch

from refrag_platform.corpus.splits import Split
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import FinetunedRecipe, TrainingRecipe
from refrag_platform.stages import StageContext
from refrag_platform.training.core.artifact import finish, load_model
from refrag_platform.training.core.batch import to_device
from refrag_platform.training.core.loop import Task, TrainingDiverged, train
from refrag_platform.training.core.lora import merge_lora

BATCHES = 16
# What a rate is chosen by: the corpus' own questions, each with its answer among the passages.
QUESTIONS_ALONE: dict[str, Any] = {
    "tasks": {"rag": 1.0}, "questions": [], "summaries": [], "distractors": [],
    "text_share": 0.0, "no_answer_share": 0.0, "lora_rank": None,
}  # fmt: skip


class TaskOf(Protocol):
    """Fine-tuning of a model, over the questions of a split."""

    def __call__(self, model: RefragModel, settings: FinetunedRecipe, split: Split = "train") -> Task: ...


def train_at_best_rate(context: StageContext, rates: Sequence[float], task_of: TaskOf) -> dict[str, Any]:
    """The stage finetuned of a control with each of these rates; the best one's model, and in its metrics how all did.

    Raises:
        RefragError: the corpus has no validation questions to choose by.
    """
    recipe, settings = context.recipe, context.recipe.finetuned

    def work_of(rate: float) -> Path:
        return context.work / f"rate-{rate:g}"

    def trained(rate: float) -> tuple[RefragModel, dict[str, Any]]:
        model = load_model(context, context.inputs["cpt"])
        chosen = settings.model_copy(update={"decoder_learning_rate": rate})
        return model, train(task_of(model, chosen), chosen, work_of(rate), f"finetuned of {recipe.name} at {rate:g}")

    def judged(model: RefragModel) -> float:
        asked = settings.model_copy(update=QUESTIONS_ALONE)
        return mean_loss(task_of(model, asked, "validation"), settings, model.device)

    best, model, summary, losses = best_rate(rates, trained, judged)
    shutil.copy(work_of(best) / "metrics.jsonl", context.work)
    tried = {f"validation_loss_at_{rate}": loss for rate, loss in losses.items()}
    return finish(context, model, summary) | {"learning_rate": best, **tried}


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
