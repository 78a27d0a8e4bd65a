"""The job over all assets, and its weekly schedule, which is off until someone turns it on."""

from __future__ import annotations

from collections.abc import Iterator

from dagster import (
    AssetSelection,
    DefaultScheduleStatus,
    RunRequest,
    ScheduleEvaluationContext,
    define_asset_job,
    schedule,
)

from assets.partitions import MODELS

refrag_pipeline = define_asset_job(
    "refrag_pipeline",
    AssetSelection.all(),
    description="Everything of one model, from its sources to its Bento; what is up to date is only checked.",
)


@schedule(
    job=refrag_pipeline,
    cron_schedule="0 3 * * 0",
    default_status=DefaultScheduleStatus.STOPPED,
    description="Sundays at 03:00, every model: new documents and changed recipes are taken in.",
)
def weekly(context: ScheduleEvaluationContext) -> Iterator[RunRequest]:
    for model in MODELS.get_partition_keys():
        yield RunRequest(f"{model} {context.scheduled_execution_time:%Y-%m-%d}", partition_key=model)
