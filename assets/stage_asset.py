"""The one mechanism of all assets: cached, or run through Pipes; checked; recorded in DVC; reported.

The manifest says whether an artifact is current, `refrag run` makes it, DVC keeps it, Dagster decides when.
No DVC lock is held while a stage runs.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dagster as dg

from assets.checks import blocking_failures, check_specs, kept_checks, run_checks
from assets.metadata import Metadata, Published, shown
from assets.mode import StartConfig, prepare_start
from assets.partitions import MODELS, find_project
from assets.pipes import StageFailed, StageProcess
from refrag_platform.artifacts.digest import code_digest
from refrag_platform.history import dvc
from refrag_platform.history.freshness import standing
from refrag_platform.project import Project
from refrag_platform.stages import STAGES

OWNERS = ["team:refrag"]
# One for all: the UI folds groups, and folded ones would hide the order of the graph.
GROUP = "refrag"
# Whatever trains or encodes takes a slot of this pool: one device, one stage at a time.
GPU_POOL = "gpu"


def stage_asset(
    name: str,
    *,
    description: str | None,
    kinds: Sequence[str],
    describe: Callable[[Published], Metadata],
    pool: str | None = None,
    starts_training: bool = False,
) -> dg.AssetsDefinition:
    """The asset of the stage `name`; special about it are its words and `describe`, its own metadata.

    `starts_training`: its run config says from where a retraining run trains.
    """
    stage = STAGES[name]
    root = find_project().root
    decorate = dg.asset(
        name=name,
        deps=list(stage.inputs),
        partitions_def=MODELS,
        description=description,
        group_name=GROUP,
        kinds={*kinds, "dvc"},
        owners=OWNERS,
        check_specs=check_specs(name),
        metadata={"command": f"refrag run {name} --model MODEL"},
        pool=pool,
        code_version=code_digest(root, stage.code(root)),
    )

    def materialize(context: dg.AssetExecutionContext, stage_process: StageProcess) -> Iterator[Any]:
        yield from _materialize(context, stage_process, name, describe)

    def materialize_from(
        context: dg.AssetExecutionContext, stage_process: StageProcess, config: StartConfig
    ) -> Iterator[Any]:
        prepare_start(context, find_project(), config)
        yield from _materialize(context, stage_process, name, describe)

    return decorate(materialize_from if starts_training else materialize)


def _materialize(
    context: dg.AssetExecutionContext, stage_process: StageProcess, name: str, describe: Callable[[Published], Metadata]
) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult[Any]]:
    project, model = find_project(), context.partition_key
    dvc.require_recordable(project, name, model)
    place = standing(project, name, model)
    cached = place.state == "current"
    # Of what is made anew DVC is not asked: on a disk that a failed run filled it can't answer, and the run makes room.
    recorded = cached and dvc.is_recorded(project, name, model)
    if not cached:
        yield from _run(context, stage_process, project, name, model)
    published = Published.read(project, name, model)
    if cached:
        print(f"{name} of {model}: cached, {published.manifest.hash}", flush=True)
    results = run_checks(project, published.manifest)
    if failures := blocking_failures(results):
        yield from results
        reason = f"{name} of {model} fails blocking checks:\n" + "\n".join(failures)
        raise dg.Failure(reason, allow_retries=False)
    if not recorded:
        # After a run it looks again: settings or code may have changed since the run began.
        dvc.record(project, name, model, place if cached else None)
    yield dg.MaterializeResult(
        metadata=shown(published, cached, describe(published)),
        data_version=dg.DataVersion(published.manifest.hash),
        check_results=results,
    )


def _run(
    context: dg.AssetExecutionContext, stage_process: StageProcess, project: Project, name: str, model: str
) -> Iterator[dg.AssetCheckResult]:
    """Run the stage; when its artifact failed its checks, report them first: the UI then shows which."""
    failed = project.work_dir(name, model) / "failed"
    shutil.rmtree(failed, ignore_errors=True)
    try:
        stage_process.run(context, project.root, name, model)
    except StageFailed as error:
        if failed.is_dir():
            yield from kept_checks(project, name, failed)
        raise dg.Failure(str(error), allow_retries=False) from None
