"""Resumable checkpoints: written beside, renamed when whole, the newest complete one found again."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from refrag_platform.errors import RefragError
from refrag_platform.files import partial_path, whole
from refrag_platform.quiet import quietly

COMPLETE = "complete.json"
# In a training's work folder.
FOLDER = "checkpoints"
# In a checkpoint: DeepSpeed's state as accelerate names it, and where a converted one lies.
STATE, UNIVERSAL = "pytorch_model", "universal"


def save(accelerator: Accelerator, folder: Path, step: int, facts: dict[str, Any], keep: int) -> Path:
    """Save all state after `step` steps into folder/step-N; every process calls it.

    The file that marks the checkpoint as complete is written last, before the rename.
    """
    target = folder / f"step-{step:08d}"
    partial = partial_path(target)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(whole(target)).mkdir()
        accelerator.wait_for_everyone()
        with quietly():
            accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            kept = {"step": step, "processes": accelerator.num_processes, **facts}
            (partial / COMPLETE).write_text(json.dumps(kept), encoding="utf-8")
    if accelerator.is_main_process:
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
    """Load the newest complete checkpoint and return its facts, or None when there is none.

    Raises:
        RefragError: another number of processes saved it: each has its part of the state and of the samples.
    """
    checkpoints = complete(folder)
    if not checkpoints:
        return None
    saved, now = checkpoints[-1], accelerator.num_processes
    facts = json.loads((saved / COMPLETE).read_text(encoding="utf-8"))
    processes = facts.get("processes", now)
    plugin = accelerator.state.deepspeed_plugin
    # What DeepSpeed 0.19 reads of a converted stage 3 has one count of steps for all weights, raised by each of them.
    convertible = plugin is not None and plugin.zero_stage < 3
    if convertible and converted(folder):
        saved = saved / UNIVERSAL
    elif processes != now:
        convert = (
            "convert it for any number with `python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state "
            f"--input_folder {saved / STATE} --output_folder {saved / UNIVERSAL / STATE}`, then run again; "
        )
        raise RefragError(
            f"{saved} was saved by {processes} processes, and {now} would go on from it: launch {processes} again "
            f"(num_processes); {convert if convertible else ''}"
            f"or delete {folder} to train from the start"
        )
    accelerator.load_state(str(saved))
    return facts


def converted(folder: Path) -> bool:
    """Whether DeepSpeed's converter has made a form of the newest checkpoint that any number of processes reads."""
    # The converter writes this file last.
    return any((saved / UNIVERSAL / "latest_universal").is_file() for saved in complete(folder)[-1:])
