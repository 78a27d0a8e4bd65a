"""Retraining: the job over all assets, its schedule and its sensor; both are off until someone turns them on.

`refrag_pipeline` brings the stages up to date, `retraining` does so by the mode that its run config names and lets
the gate decide about a release.
"""

import json
from collections.abc import Iterator

import dagster as dg

from assets.mode import StartConfig
from assets.partitions import MODELS, find_project
from assets.released import NAME as RELEASED
from assets.released import Promotion
from assets.settings import RetrainingSettings, retraining_settings
from refrag_platform.corpus.sources import sources_digest
from refrag_platform.errors import RefragError
from refrag_platform.history.freshness import is_current
from refrag_platform.stages import STAGES

SETTINGS = retraining_settings(find_project())
SECONDS_BETWEEN_LOOKS = 120


def run_config(settings: RetrainingSettings) -> dg.RunConfig:
    """The run config of the retraining job, as the Launchpad shows it."""
    return dg.RunConfig(
        ops={"reconstruction": StartConfig(mode=settings.mode), RELEASED: Promotion(promote=settings.promote)}
    )


refrag_pipeline = dg.define_asset_job(
    "refrag_pipeline",
    dg.AssetSelection.assets(*STAGES),
    description="Every stage of one model, from its sources to its Bento; what is up to date is only checked.",
)

retraining = dg.define_asset_job(
    "retraining",
    dg.AssetSelection.all(),
    config=run_config(SETTINGS),
    description="A new model from the sources as they are now, in full or from the released checkpoint on; it is "
    "released if the gate lets it.",
)


@dg.schedule(
    job=retraining,
    cron_schedule=SETTINGS.cron,
    execution_timezone=SETTINGS.timezone,
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description=f"{SETTINGS.cron} ({SETTINGS.timezone}), every model: new documents and changed recipes are taken in.",
)
def retraining_schedule(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest]:
    settings = retraining_settings(find_project())
    for model in MODELS.get_partition_keys():
        key = f"{model} {context.scheduled_execution_time:%Y-%m-%d %H:%M}"
        yield dg.RunRequest(key, partition_key=model, run_config=run_config(settings))


@dg.sensor(
    job=retraining,
    minimum_interval_seconds=SECONDS_BETWEEN_LOOKS,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description="New, changed or removed source documents: one run per change, however many files it is of. A change "
    "counts once it has stayed the same from one look to the next.",
)
def source_documents(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """The cursor holds, by model, the sources' digest of the last run and of the last look, and counts the runs."""
    project, requests = find_project(), []
    cursor = json.loads(context.cursor or "{}")
    for model in MODELS.get_partition_keys():
        known = cursor.get(model, {})
        try:
            digest = sources_digest(project, project.recipe(model))
        except RefragError as error:
            context.log.error(f"the sources of {model} can't be read: {error}")
            continue
        if not known:
            # Switched on: what the corpus in place was made from is no change.
            known = {"run": digest if is_current(project, "corpus", model) else "", "runs": 0}
        if digest != known["run"] and digest == known.get("seen"):
            known |= {"run": digest, "runs": known["runs"] + 1}
            # Numbered: sources that go back to what they were are a change like any other.
            key = f"{model} {known['runs']} {digest}"
            requests.append(
                dg.RunRequest(key, partition_key=model, run_config=run_config(retraining_settings(project)))
            )
        cursor[model] = {**known, "seen": digest}
    return dg.SensorResult(run_requests=requests, cursor=json.dumps(cursor, sort_keys=True))
