"""metrics.jsonl of a training run: one line every `log_every` steps, continued exactly after a resume."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from refrag_platform.artifacts.reports import GROUP_RATE
from refrag_platform.files import write_text


class MetricsLog:
    """Gathers losses on the device and writes them only when asked, so that logging costs no synchronization."""

    def __init__(self, path: Path, step: int, pending: list[float], accelerator: Accelerator) -> None:
        """Lines after `step` were written by a run that was killed later than its checkpoint: they are dropped.

        `pending` are the losses since the last line that the checkpoint brings back.
        """
        enabled = accelerator.is_main_process
        self.path, self.enabled, self.accelerator = path, enabled, accelerator
        self.last: dict[str, Any] = {}
        self._losses: list[Tensor] = [torch.tensor(loss, device=accelerator.device) for loss in pending]
        self._figures: dict[str, Any] = {}
        self._positions, self._clock = 0, time.monotonic()
        if enabled:
            kept = [line for line in read(path) if line["step"] <= step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self.last = kept[-1] if kept else {}

    def count(self, loss: Tensor, figures: dict[str, Any], positions: int) -> None:
        """Add one step."""
        self._losses.append(loss)
        self._figures = figures
        self._positions += positions

    def pending(self) -> list[float]:
        """Losses since the last line, the mean over processes of each, for the checkpoint; all processes call it."""
        if not self._losses:
            return []
        losses = torch.stack(self._losses)
        if self.accelerator.num_processes > 1:
            losses = self.accelerator.reduce(losses, "mean")
        return losses.tolist()

    def write(self, step: int, rates: dict[str, float], probe: dict[str, float]) -> dict[str, Any]:
        """Write a line with the mean loss since the last one, and return it.

        Args: rates: the learning rate of each parameter group, by its name; `learning_rate` is the largest.
        """
        mean = torch.stack(self._losses).mean()
        loss = float(self.accelerator.reduce(mean, "mean")) if self.accelerator.num_processes > 1 else float(mean)
        seconds = time.monotonic() - self._clock
        line: dict[str, Any] = {"step": step, "loss": loss, "learning_rate": max(rates.values())}
        line |= {f"{GROUP_RATE}{name}": rate for name, rate in rates.items()}
        line |= self._over_ranks({name: float(value) for name, value in self._figures.items()} | probe)
        line |= {"tokens_per_second": self._positions / seconds, "memory_gb": memory_gb()} | clock()
        if self.enabled:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        self._losses.clear()
        self._positions, self._clock = 0, time.monotonic()
        self.last = line
        return line

    def _over_ranks(self, figures: dict[str, float]) -> dict[str, float]:
        """The mean of each over the ranks that have it: a batch's part may hold nothing of a kind."""
        if self.accelerator.num_processes == 1:
            return figures
        every = gather_object([figures])
        names = dict.fromkeys(name for one in every for name in one)
        return {name: fmean(one[name] for one in every if name in one) for name in names}


def memory_gb() -> float:
    """Peak memory of the device, or of the process where there is none, in GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def clock() -> dict[str, float]:
    """{"clock_mhz": the GPU's clock}, by which slow code is told from a throttled device; {} if it can't be read."""
    if not torch.cuda.is_available():
        return {}
    try:
        return {"clock_mhz": float(torch.cuda.clock_rate())}
    except Exception:  # Without NVIDIA's library, or where the driver doesn't say: a rate alone is no reason to stop.
        return {}


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
