"""In what precision a machine computes what the recipe asks for."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from refrag_platform.model.precision import cpu_multiplies_bf16


def computes_bf16(precision: str, device: torch.device) -> bool:
    """Whether `precision: bf16` is computed in bfloat16; on a CPU that can't multiply it, float32 takes its place.

    Such a CPU would go element by element: 1.4 GFLOP/s where float32 does 40 (an AVX2 machine, two cores).
    """
    return precision == "bf16" and (device.type != "cpu" or cpu_multiplies_bf16())


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Autocast to what `precision` means on this device."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(precision, device))
