"""An artifact gets into its place whole or not at all, whenever the process is killed.

A stage's scratch folder work/NAME/STAGE/ holds

    .lock        held by the one runner
    fingerprint  of the run that state/ and making/ belong to
    state/       what a killed run continues from
    making/      the artifact in the making; never trusted
    ready/       a finished one, manifest included, on its way into place
    old/         the one that it replaces, on its way out
    failed/      one whose blocking checks failed, for a look
    trash/       what is being deleted

Each appears and disappears by a rename, so that what has a name other than making/ and trash/ is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from refrag_platform.errors import RefragError
from refrag_platform.files import lock_file, write_json

INPUTS_FILE = "inputs.json"


def only_runner(work: Path) -> TextIO:
    """The stage's lock, held until it is closed.

    Raises:
        RefragError: another process holds it.
    """
    try:
        return lock_file(work / ".lock", wait=False)
    except BlockingIOError:
        raise RefragError(f"another process is running this stage (lock {work / '.lock'}); wait for it") from None


def prepare(work: Path, fingerprint: str) -> tuple[Path, Path]:
    """An empty making/ with content/ in it, and state/, which is kept only from a run of the same fingerprint."""
    mark = work / "fingerprint"
    if not mark.is_file() or mark.read_text() != fingerprint:
        _discard(work, "state", "ready", "failed")
        mark.write_text(fingerprint)
    _discard(work, "making")
    making, state = work / "making", work / "state"
    (making / "content").mkdir(parents=True)
    state.mkdir(exist_ok=True)
    return making, state


def seal(content: Path, inputs: Mapping[str, str], sources: list[str]) -> None:
    """Put the hashes of what went in into the artifact, so that its own hash stands for the whole chain.

    A changed byte of a source then changes every hash after it, even where the same weights come out.
    """
    hashes = {"inputs": dict(inputs), "sources": sorted(sources)}
    write_json(content / INPUTS_FILE, hashes, sort_keys=True)


def publish(folder: Path, work: Path) -> None:
    """Two renames put the finished making/ into place at `folder`; `recover` completes what a kill interrupts."""
    _discard(work, "ready", "old")
    (work / "making").rename(work / "ready")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rename(work / "old")
    (work / "ready").rename(folder)
    _discard(work, "old", "state")


def recover(folder: Path, work: Path) -> None:
    """Finish or undo a publication that was killed between its two renames."""
    for name in ("ready", "old"):
        if not folder.exists() and (work / name).exists():
            (work / name).rename(folder)
    _discard(work, "old")


def settle(work: Path, fingerprint: str) -> None:
    """Drop what a run left to continue from, once the artifact of that fingerprint is in place."""
    mark = work / "fingerprint"
    if mark.is_file() and mark.read_text() == fingerprint:
        _discard(work, "making", "state", "ready")


def keep_failed(work: Path) -> Path:
    """Set the artifact in the making aside for a look; returns where it is."""
    _discard(work, "failed")
    return (work / "making").rename(work / "failed")


def _discard(work: Path, *names: str) -> None:
    """Delete folders of `work` that are there; a kill leaves of them all or, under their name, nothing."""
    trash = work / "trash"
    for name in names:
        # Emptied first: a kill may have left something, and nothing can be renamed onto it.
        if trash.exists():
            shutil.rmtree(trash)
        if (work / name).exists():
            (work / name).rename(trash)
    if trash.exists():
        shutil.rmtree(trash)
