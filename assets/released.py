"""Released model: the version that the service runs; the gate lets a candidate take its place, or refuses it.

Empty until a first version is released: materialize this asset once the others are made, or `refrag release promote
MODEL`. Until then the service runs what is in place.
"""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from assets.metadata import Metadata, Published, answers, numbers, table
from assets.partitions import MODELS, find_project
from assets.settings import PROMOTE_HELP, retraining_settings
from assets.stage_asset import GPU_POOL, GROUP, OWNERS
from refrag_platform.errors import RefragError
from refrag_platform.history.versions import Release
from refrag_platform.project import Project
from refrag_platform.releases.promotion import PromotionResult, promote

NAME, GATE = "released", "gate"


class Promotion(dg.Config):
    """What the Launchpad asks of `released`."""

    promote: bool = Field(default=True, description=PROMOTE_HELP)


@dg.multi_asset(
    name=NAME,
    partitions_def=MODELS,
    specs=[
        dg.AssetSpec(
            NAME,
            deps=["package"],
            description=__doc__,
            group_name=GROUP,
            kinds={"git", "dvc"},
            owners=OWNERS,
            metadata={"command": "refrag release promote MODEL --again"},
            # A refused candidate leaves the released one: nothing is materialized then.
            skippable=True,
            freshness_policy=dg.FreshnessPolicy.time_window(
                fail_window=timedelta(days=retraining_settings(find_project()).fresh_days)
            ),
        )
    ],
    check_specs=[
        dg.AssetCheckSpec(
            GATE,
            asset=NAME,
            description="The candidate holds against the released model on every figure of release.tolerances.",
        )
    ],
    # The released model is evaluated again where new documents changed the held-out set.
    pool=GPU_POOL,
)
def released(
    context: dg.AssetExecutionContext, config: Promotion
) -> Iterator[dg.AssetCheckResult | dg.AssetObservation | dg.MaterializeResult[Any]]:
    project, model = find_project(), context.partition_key
    try:
        outcome = promote(project, model, evaluate_again=True, judge_only=not config.promote)
    except RefragError as error:
        raise dg.Failure(f"the gate can't judge {model}: {error}", allow_retries=False) from None
    said, refused = _said(outcome, model), _refused(outcome)
    context.log.warning(said) if refused else context.log.info(said)
    figures = _figures(outcome)
    yield dg.AssetCheckResult(
        asset_key=NAME,
        check_name=GATE,
        passed=not refused,
        severity=dg.AssetCheckSeverity.WARN,
        description=said,
        metadata=figures,
    )
    if outcome.release is not None and not refused and (config.promote or outcome.decision is None):
        yield dg.MaterializeResult(
            asset_key=NAME,
            metadata={"outcome": dg.MetadataValue.text(said), **_facts(project, outcome.release), **figures},
            data_version=dg.DataVersion(f"{outcome.release.version} {outcome.release.commit[:12]}"),
        )
    else:
        yield dg.AssetObservation(
            NAME, partition=model, metadata={"outcome": dg.MetadataValue.text(said), **figures}, description=said
        )


def _refused(outcome: PromotionResult) -> bool:
    return outcome.decision is not None and not outcome.decision.promoted


def _said(outcome: PromotionResult, model: str) -> str:
    """The outcome in one sentence; a refusal begins with that word."""
    version = outcome.release.version if outcome.release else None
    if outcome.decision is None:
        return f"what is in place is {model}@{version}, which is released already"
    stays = f"{model}@{version} stays the released one" if version else f"no version of {model} is released"
    if not outcome.decision.promoted:
        return f"{outcome.decision.reason}; {stays}"
    if not outcome.new:
        return f"judged only: the gate would have {outcome.decision.reason}; {stays}"
    return f"{outcome.decision.reason}; {model}@{version} is released"


def _figures(outcome: PromotionResult) -> Metadata:
    """What decided, figure by figure; the gains plot over runs."""
    decision = outcome.decision
    if decision is None:
        return {}
    rows = [asdict(verdict) for verdict in decision.verdicts]
    gains = {row["metric"]: row["gain"] for row in rows if row["gain"] is not None}
    return {
        "decision": dg.MetadataValue.text("promoted" if decision.promoted else "refused"),
        "reason": dg.MetadataValue.text(decision.reason),
        "verdicts": table(rows),
        "figures": dg.MetadataValue.json(decision.plain()),
        **numbers(gains, "gain."),
    }


def _facts(project: Project, release: Release) -> Metadata:
    """The released version: its tags and commit, its artifacts, its figures beside those of the other models."""
    return {
        "version": dg.MetadataValue.text(f"{release.model}@{release.version}"),
        "commit": dg.MetadataValue.text(release.commit),
        "released": dg.MetadataValue.text(release.date),
        "artifacts": table([{"artifact": stage, "hash": digest} for stage, digest in release.hashes.items()]),
        **answers(Published.read(project, "evaluation", release.model)),
        **numbers(release.metrics),
    }
