"""How times are taken: what is compared runs in turns, so that noise hits all alike, and medians are told with spread.

Also the machine's own ceilings, measured as it is now: a large matrix product, and a large copy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """Something to time: `run` is measured, `prepare` goes before it unmeasured."""

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Times:
    """Wall times of one case in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third: half of the runs lie between them."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def in_turns(cases: Mapping[str, Case], runs: int, warmup: int, device: torch.device) -> dict[str, Times]:
    """Time every case `runs` times, one round after another, each round starting with another case.

    Args:
        warmup: unmeasured runs of each case, before all others (compilation, graph capture).
    """
    for case in cases.values():
        for _ in range(warmup):
            timed(case, device)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(runs):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timed(cases[name], device))
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def timed(case: Case, device: torch.device) -> float:
    """Seconds from a quiet device to a quiet device."""
    if case.prepare:
        case.prepare()
    synchronize(device)
    begun = time.perf_counter()
    case.run()
    synchronize(device)
    return time.perf_counter() - begun


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Ceilings:
    """peak: FLOP/s of a large matrix product. bandwidth: bytes/s of a large copy, read and written ones counted."""

    peak: float
    bandwidth: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, runs: int = 10) -> Ceilings:
        """The best of some runs: a limit is what the machine can do, not what it mostly does."""
        size, length = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
        generator = torch.Generator(device).manual_seed(0)
        left, right = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
        source = torch.zeros(length, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        product, copied = torch.empty_like(left), Case(lambda: target.copy_(source))
        multiplied = Case(lambda: torch.matmul(left, right, out=product))
        times = in_turns({"product": multiplied, "copy": copied}, runs, 3, device)
        return cls(2 * size**3 / min(times["product"].seconds), 2 * length / min(times["copy"].seconds))
