"""Dagster's run of a model's stages, started from a command, in a process of its own: the library knows no Dagster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def materialize(root: Path, model: str, *stages: str) -> int:
    """Run the pipeline of the project at `root`, or some stages of it, on its Dagster instance; returns the status.

    Stopped by a signal, the stage that runs has its time to save.
    """
    from refrag_platform.processes import ends_with_parent

    # A session of its own: a terminal's interrupt would come to it a second time while it saves.
    pipeline = subprocess.Popen(
        [sys.executable, "-m", "assets.materialize", model, *stages],
        cwd=root,
        env={**os.environ, "REFRAG_ROOT": str(root)},
        start_new_session=True,
        preexec_fn=ends_with_parent(signal.SIGTERM),
    )
    try:
        return pipeline.wait()
    except KeyboardInterrupt:
        pipeline.send_signal(signal.SIGINT)
        pipeline.wait()
        raise
