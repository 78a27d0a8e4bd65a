"""What a training stage leaves: the model folder with training.json, and the metrics beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refrag_platform.artifacts.publication import INPUTS_FILE
from refrag_platform.artifacts.reports import MACHINE
from refrag_platform.files import write_json
from refrag_platform.model.refrag import RefragModel
from refrag_platform.stages import StageContext
from refrag_platform.training.core.lora import merge_lora
from refrag_platform.training.core.ranks import is_main

TRAINING_FILE = "training.json"
# What a training states of itself. The last two, of the same batches before and after it, only where it took them.
FIGURES = ("steps", "first_loss", "last_loss", "loss_before", "loss_after")


def load_model(context: StageContext, folder: Path) -> RefragModel:
    """The model in the folder of an earlier stage or release, in float32, to be trained for the recipe's rates."""
    model = RefragModel.load(folder)
    model.rates = tuple(context.recipe.encoder.rates)
    return model


def finish(context: StageContext, model: RefragModel, summary: dict[str, Any]) -> dict[str, Any]:
    """Write a trained model and its figures into the artifact; weights keep the precision they were trained for.

    Returns the figures, as the stage's metrics.
    """
    merge_lora(model)
    if is_main():
        bf16 = getattr(context.recipe, context.stage).precision == "bf16"
        model.save(context.out, torch.bfloat16 if bf16 else torch.float32)
    parts: dict[str, nn.Module] = {"encoder": model.encoder, "projection": model.projection, "decoder": model.decoder}
    return write_training(context, summary, parameter_counts(parts))


def take_over(context: StageContext, folder: Path) -> dict[str, Any]:
    """Make the artifact of the model in `folder`, byte for byte; returns its figures."""
    if not is_main():
        return {}
    # What went into this artifact is sealed into it later.
    shutil.copytree(folder, context.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(INPUTS_FILE))
    figures = json.loads((context.out / TRAINING_FILE).read_text(encoding="utf-8"))
    return {**_stated(figures), **figures.get("last", {})}


def parameter_counts(modules: dict[str, nn.Module]) -> dict[str, int]:
    """Numbers of parameters by part."""
    return {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in modules.items()}


def write_training(context: StageContext, summary: dict[str, Any], parameters: dict[str, int]) -> dict[str, Any]:
    """Write training.json (deterministic figures) into the artifact and metrics.jsonl beside it.

    Returns the figures, as the stage's metrics.
    """
    last = {key: value for key, value in summary["last"].items() if key not in MACHINE}
    figures = {**_stated(summary), "last": last, "parameters": parameters}
    if not is_main():
        return {}
    write_json(context.out / TRAINING_FILE, figures, sort_keys=True, allow_nan=True)
    if (log := context.work / "metrics.jsonl").is_file():  # What is taken over was trained elsewhere.
        shutil.copy(log, context.beside / "metrics.jsonl")
    return {**_stated(figures), **last}


def _stated(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: figures[key] for key in FIGURES if key in figures}
