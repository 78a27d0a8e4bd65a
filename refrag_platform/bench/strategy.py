"""What of a model's state each GPU holds, as a stage's accelerate config shares it out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from refrag_platform.errors import RecipeError
from refrag_platform.recipes import Recipe
from refrag_platform.training.launch_files import launch_files

# DeepSpeed's defaults: gradients gathered before they are sent (reduce_bucket_size), and under ZeRO-3 weights that are
# whole at once (stage3_max_live_parameters).
BUCKET, LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Strategy:
    """zero: DeepSpeed's stage, None without it. offload: the optimizer lies in the CPUs' memory. copies: GPUs that
    together hold a second copy of the weights (hpZ), 0 for none.
    """

    processes: int
    zero: int | None = None
    offload: bool = False
    copies: int = 0

    def __str__(self) -> str:
        if self.zero is None:
            return "DDP" if self.processes > 1 else "one process"
        return f"ZeRO-{self.zero}" + (", optimizer on the CPUs" if self.offload else "")


@dataclass(frozen=True)
class DeviceState:
    """Bytes on each GPU before anything is computed, and what DDP and DeepSpeed gather gradients in."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float


def strategy(base: Path, stage: str, recipe: Recipe, processes: int | None) -> Strategy:
    """How a stage is launched; `processes` stand for those of its accelerate config.

    Args: base: the recipe's folder.

    Raises:
        RecipeError: the file isn't there, or is neither of DDP nor of DeepSpeed.
    """
    files = launch_files(base, stage, recipe)
    if files is None:
        return Strategy(1)
    values: dict[str, Any] = yaml.safe_load(files.config.read_text(encoding="utf-8"))
    kind, count = str(values.get("distributed_type", "NO")), processes or files.processes
    if kind == "DEEPSPEED":
        settings = values.get("deepspeed_config") or {}
        zero: dict[str, Any] = {}
        if files.deepspeed:
            zero = json.loads(files.deepspeed.read_text(encoding="utf-8")).get("zero_optimization", {})
        stage_number = int(zero.get("stage", settings.get("zero_stage", 2)))
        device = zero.get("offload_optimizer", {}).get("device", settings.get("offload_optimizer_device", "none"))
        return Strategy(count, stage_number, device not in (None, "none"), int(zero.get("zero_hpz_partition_size", 0)))
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise RecipeError(f"{files.config}: distributed_type is {kind}; a training runs with DDP or DeepSpeed")
    return Strategy(1 if kind == "NO" else count)


def device_state(
    module: nn.Module, frozen: tuple[nn.Module, ...], trained: list[nn.Parameter], bf16: bool, how: Strategy
) -> DeviceState:
    """What lies on each GPU while a step runs.

    Without DeepSpeed weights are float32 and autocast rounds them; with it weights and gradients are bfloat16, and the
    optimizer keeps float32 ones. AdamW has two moments of each. What is frozen beside the module stays as it is.

    Args: trained: what the optimizer is given. bf16: whether it computes in that.
    """
    count, steps, parts = sum(parameter.numel() for parameter in trained), 4 * len(trained), how.processes
    beside = _bytes([tensor for model in frozen for tensor in (*model.parameters(), *model.buffers())])
    parameters, buffers = _bytes(list(module.parameters())), _bytes(list(module.buffers()))
    if how.zero is None:
        return DeviceState(beside + parameters + buffers, 4 * count, 8 * count + steps, 4 * count if parts > 1 else 0)
    low = 2 if bf16 else 4
    whole = parameters * low / 4
    weights, buckets = whole, float(low * min(BUCKET, count))
    if how.zero == 3:
        weights = whole / parts + (whole / how.copies if how.copies else 0)
        buckets += min(low * LIVE, whole)
    gradients = low * count / (parts if how.zero >= 2 else 1)
    optimizer = 0.0 if how.offload else 12 * count / parts
    return DeviceState(beside + weights + buffers * low / 4, gradients, optimizer, buckets)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
