"""Kinds of GPUs as their makers state them, and what share of that a training reached, from result files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from refrag_platform.errors import RefragError


@dataclass(frozen=True)
class Gpu:
    """name: as it stands in the device's own name. memory: bytes. peak: dense bfloat16 matrix products, FLOP/s."""

    name: str
    memory: float
    peak: float


GPUS = {
    "h100": Gpu("H100", 80e9, 989e12),
    "h200": Gpu("H200", 141e9, 989e12),
    "a100": Gpu("A100", 80e9, 312e12),
    "l40s": Gpu("L40S", 48e9, 362e12),
    "b200": Gpu("B200", 180e9, 2250e12),
}


@dataclass(frozen=True)
class Utilisation:
    """The share of a GPU's peak that a training reached, where it was measured, and whether that was on such a GPU."""

    share: float
    file: Path
    device: str
    loop: str
    same_kind: bool


def gpu(kind: str) -> Gpu:
    """The GPU of this kind.

    Raises:
        RefragError: it is not known.
    """
    if kind not in GPUS:
        raise RefragError(f"there is no GPU kind {kind!r}; there are {', '.join(GPUS)}")
    return GPUS[kind]


def stated_peak(device: str) -> float | None:
    """The peak of a device by its name, None where it is of no known kind."""
    return next((kind.peak for kind in GPUS.values() if kind.name in device), None)


def measured_utilisation(kind: Gpu, compiled: bool, flops_per_position: float, results: list[Path]) -> Utilisation:
    """What `refrag bench train` measured on this kind of GPU, else on another; of several, the model nearest in size.

    Args:
        compiled: by our loop; eager, by the plain one beside it, which keeps whole logits as well.
        results: files of `refrag bench train`.

    Raises:
        RefragError: none of the files has a share of a peak.
    """
    loop = "refrag" if compiled else "plain transformers"
    candidates: list[tuple[bool, float, Utilisation]] = []
    for file in results:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            shares = {row["loop"]: row["mfu"] for row in result["rows"]}
            positions = result["rows"][0]["positions_per_second"] * result["rows"][0]["step_seconds"]
            distance = abs(math.log(result["step_flops"] / positions / flops_per_position))
            same_kind = kind.name in result["device"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RefragError(
                f"{file} is no result of `refrag bench train` ({type(error).__name__}: {error})"
            ) from None
        if share := shares.get(loop):
            candidates.append((not same_kind, distance, Utilisation(share, file, result["device"], loop, same_kind)))
    if not candidates:
        places = ", ".join(map(str, results)) or "docs/results/bench-train-*.json"
        raise RefragError(
            f"no share of a peak for the loop `{loop}` in {places}; measure one with `refrag bench train` on a GPU and "
            "name it with --measured"
        )
    return min(candidates, key=lambda candidate: candidate[:2])[2]
