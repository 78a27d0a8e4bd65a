"""Resumable checkpoints: written beside, renamed when whole, the newest complete one found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from refrag_platform.quiet import quietly

COMPLETE = "complete.json"
# In a training's work folder.
FOLDER = "checkpoints"


def save(accelerator: Accelerator, folder: Path, step: int, facts: dict[str, Any], keep: int) -> Path:
    """Save all state after `step` steps into folder/step-N; every process calls it.

    The file that marks the checkpoint as complete is written last, before the rename.
    """
    target, partial = folder / f"step-{step:08d}", folder / f"step-{step:08d}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with quietly():
        accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / COMPLETE).write_text(json.dumps({"step": step, **facts}), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first; half-written ones are not among them."""
    return sorted(
        path.parent for path in folder.glob(f"step-*/{COMPLETE}") if not path.parent.name.endswith(".partial")
    )


def newest(state: Path) -> list[Path]:
    """The newest complete checkpoint of each training below `state`: of a control that tries several rates, several."""
    return [checkpoints[-1] for folder in sorted(state.rglob(FOLDER)) if (checkpoints := complete(folder))]


def steps_done(state: Path) -> int:
    """Steps that the trainings below `state` would not repeat."""
    return sum(int(folder.name.removeprefix("step-")) for folder in newest(state))


def resume(accelerator: Accelerator, folder: Path) -> dict[str, Any] | None:
    """Load the newest complete checkpoint and return its facts, or None when there is none."""
    checkpoints = complete(folder)
    if not checkpoints:
        return None
    accelerator.load_state(str(checkpoints[-1]))
    return json.loads((checkpoints[-1] / COMPLETE).read_text(encoding="utf-8"))
