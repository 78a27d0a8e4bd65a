"""Run a stage on several processes: `accelerate launch` with the config file that the recipe names.

The parent prepares and publishes the artifact as for any stage; the ranks run this module as

    accelerate launch --config_file zero2.yaml -m refrag_platform.training.launch JOB.json

Which machines take part is no matter of the recipe: options in $REFRAG_LAUNCH count over the file.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, cast

from refrag_platform.errors import Paused, RecipeError, RefragError
from refrag_platform.files import write_json
from refrag_platform.processes import ends_with_parent, leave
from refrag_platform.project import Project
from refrag_platform.stages import STAGES, StageContext, stage_function
from refrag_platform.training.core.ranks import is_main, world_size
from refrag_platform.training.launch_files import LaunchFiles

JOB, RESULT = "job.json", "result.json"
# Options of `accelerate launch` that this machine sets over the config file, for instance its place in a cluster.
OPTIONS = "REFRAG_LAUNCH"
# How long the launcher lets stopped ranks save before it kills them.
SECONDS_TO_SAVE = 600


def launch(context: StageContext, files: LaunchFiles) -> dict[str, Any]:
    """Run the stage's function on every rank and return rank 0's metrics.

    SIGINT and SIGTERM are passed on, so that all ranks save.

    Raises:
        Paused: the ranks were stopped.
        RefragError: they failed, or $REFRAG_LAUNCH can't be read.
    """
    path, options = files.config, _options()
    if files.deepspeed:
        options = ["--deepspeed_config_file", str(files.deepspeed), *options]
    job, result = context.work / JOB, context.work / RESULT
    result.unlink(missing_ok=True)
    expected = {"config": path.name, "processes": _option(options, "num_processes") or files.processes}
    write_json(job, {**_plain(context), **expected})
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(path)]
    ranks = subprocess.Popen(
        [*command, *options, "-m", "refrag_platform.training.launch", str(job)],
        env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS_TO_SAVE), **os.environ},
        stdin=subprocess.DEVNULL,
        # A signal to our group would reach the launcher twice: from there, and from here.
        start_new_session=True,
        preexec_fn=ends_with_parent(signal.SIGKILL),
    )
    stopped = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        ranks.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = ranks.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status or not result.is_file():
        how = "were stopped" if stopped else f"ended with status {status}; their messages are above"
        raise (Paused if stopped else RefragError)(
            f"{context.stage} of {context.recipe.name}: the processes that {path.name} launched {how}. "
            "Run it again to continue from the newest checkpoint"
        )
    return json.loads(result.read_text(encoding="utf-8"))


def _options() -> list[str]:
    options = os.environ.get(OPTIONS, "")
    try:
        return shlex.split(options)
    except ValueError as error:
        raise RefragError(f"{OPTIONS} is {options!r} ({error}); give options of `accelerate launch`") from None


def _option(options: list[str], name: str) -> int | None:
    """The number that `accelerate launch` is given by an option, if it is."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=int)
    return cast("int | None", getattr(parser.parse_known_args(options)[0], name))


def _plain(context: StageContext) -> dict[str, Any]:
    return {
        "root": str(context.project.root),
        "model": context.recipe.name,
        "stage": context.stage,
        "inputs": {name: str(path) for name, path in context.inputs.items()},
        "out": str(context.out),
        "work": str(context.work),
        "beside": str(context.beside),
    }


def run_rank(job: Path) -> None:
    """One rank: the stage's function, whose metrics rank 0 leaves for the parent."""
    # The launcher gives each rank a session of its own: killed, it would leave them running.
    ends_with_parent(signal.SIGKILL)()
    facts = json.loads(job.read_text(encoding="utf-8"))
    if world_size() != facts["processes"]:
        raise RecipeError(
            f"{facts['config']} asks for {facts['processes']} processes, accelerate started {world_size()}. It starts "
            "several for `distributed_type: MULTI_GPU` (on CPUs with `use_cpu: true`; MULTI_CPU needs MPI) or DEEPSPEED"
        )
    project = Project(Path(facts["root"]))
    context = StageContext(
        project=project,
        recipe=project.recipe(facts["model"]),
        stage=facts["stage"],
        inputs={name: Path(path) for name, path in facts["inputs"].items()},
        out=Path(facts["out"]),
        work=Path(facts["work"]),
        beside=Path(facts["beside"]),
    )
    metrics = stage_function(STAGES[context.stage])(context)
    if is_main():
        write_json(context.work / RESULT, metrics, allow_nan=True)


if __name__ == "__main__":
    try:
        run_rank(Path(sys.argv[1]))
    except RefragError as error:
        print(f"refrag: {error}", file=sys.stderr)
        leave(1)
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)
