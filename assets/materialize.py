"""Run the whole pipeline of a model, or some stages, in this process, as `make demo` does: the UI later shows the run.

python -m assets.materialize MODEL [STAGE...]
"""

import os
import sys
from collections.abc import Sequence

import dagster as dg

from assets.launcher import PROCESS_TAG, is_alive, this_process
from assets.partitions import find_project
from assets.webhook import failure_reason
from refrag_platform.dials import require_named
from refrag_platform.stages import STAGES


def materialize_all(model: str, stages: Sequence[str] = tuple(STAGES)) -> bool:
    """Materialize the assets of `model` on the project's Dagster instance; True when all succeeded.

    Progress bars show on a terminal, other output as it comes. `stages`: only these.

    Raises:
        RefragError: params.yaml does not name the model.
        KeyboardInterrupt: a signal stopped it, after the running stage had its time to save.
    """
    # Loaded here: definitions take seconds.
    from assets.definitions import definitions
    from assets.pipes import StageProcess

    project = find_project()
    require_named(project, model)
    os.environ.setdefault("DAGSTER_HOME", str(project.root / ".dagster_home"))
    with dg.DagsterInstance.get() as instance:
        close_dead_runs(instance)
        defs = definitions(StageProcess(terminal=_terminal()))
        try:
            result = defs.resolve_job_def("refrag_pipeline").execute_in_process(
                instance=instance,
                partition_key=model,
                asset_selection=[dg.AssetKey(stage) for stage in stages],
                raise_on_error=False,
                # Dagster's own errors are stack traces; what a user needs is printed below.
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                tags={PROCESS_TAG: this_process()},
            )
        except dg.DagsterExecutionInterruptedError:
            raise KeyboardInterrupt from None
    failures = result.filter_events(lambda event: event.is_step_failure)
    for event in failures:
        print(f"{event.step_key} failed: {failure_reason(event)}", file=sys.stderr)
    # A run may fail before any step of it.
    for event in [] if failures else result.filter_events(lambda event: event.is_failure):
        print(f"the run failed: {event.message}", file=sys.stderr)
    return result.success


def close_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """End the runs whose process was killed: they would hold their pool's slot, and look alive, for ever."""
    dead = [
        run
        for run in instance.get_runs(
            dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING])
        )
        if not is_alive(instance, run)
    ]
    for run in dead:
        instance.report_run_failed(run, "the process of this run was killed")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return [run.run_id for run in dead]


def _terminal() -> int | None:
    """A copy of stderr when it is a terminal; Dagster takes the original for its logs."""
    return os.dup(2) if os.isatty(2) else None


if __name__ == "__main__":
    try:
        sys.exit(not materialize_all(sys.argv[1], sys.argv[2:] or tuple(STAGES)))
    except KeyboardInterrupt:
        sys.exit("interrupted; run it again to continue")
