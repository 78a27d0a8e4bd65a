"""In what precision a machine computes what the recipe asks for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import torch


def computes_bf16(precision: str, device: torch.device) -> bool:
    """Whether `precision: bf16` is computed in bfloat16; on a CPU that can't multiply it, float32 takes its place.

    Such a CPU would go element by element: 1.4 GFLOP/s where float32 does 40 (an AVX2 machine, two cores).
    """
    return precision == "bf16" and (device.type != "cpu" or _cpu_multiplies_bf16())


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Autocast to what `precision` means on this device."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(precision, device))


@cache
def _cpu_multiplies_bf16() -> bool:
    # oneDNN has the kernels; where it hasn't, PyTorch falls back to plain loops.
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
