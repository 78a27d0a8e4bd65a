"""From where a retraining run trains: in full, or on from the released checkpoint. Asked in the Launchpad."""

from typing import Literal

import dagster as dg
from pydantic import Field

from assets.settings import MODE_HELP
from refrag_platform.errors import RefragError
from refrag_platform.project import Project
from refrag_platform.releases.continuation import set_start


class StartConfig(dg.Config):
    """What the Launchpad asks of `reconstruction`, the first training."""

    mode: Literal["as set", "full", "continue"] = Field(
        default="as set", description=f"{MODE_HELP} as set: nothing is changed."
    )


def prepare_start(context: dg.AssetExecutionContext, project: Project, start: StartConfig) -> None:
    """Put the mode into the run's overrides, which DVC and every stage read, and say in the log what it means."""
    if start.mode == "as set":
        return
    try:
        context.log.info(set_start(project, context.partition_key, start.mode))
    except RefragError as error:
        raise dg.Failure(f"mode {start.mode}: {error}", allow_retries=False) from None
