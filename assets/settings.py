"""How retraining runs by itself: the section `retraining` of params.yaml, typed and checked when the UI loads.

retraining: {cron: "0 3 * * 0", timezone: Europe/Berlin, mode: continue, promote: true, fresh_days: 14}
"""

from __future__ import annotations

from typing import Literal
from zoneinfo import ZoneInfo

from dagster import DagsterInvalidDefinitionError, ScheduleDefinition
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from refrag_platform.errors import RefragError
from refrag_platform.faults import explain
from refrag_platform.project import Project

Mode = Literal["full", "continue"]
MODE_HELP = (
    "full: training starts from scratch, or from models/NAME/release where params.yaml says continue_from: release. "
    "continue: it goes on from the released checkpoint on the new documents, the encoder frozen, and only changed "
    "passages are encoded again."
)
PROMOTE_HELP = "Release the model if no figure of the recipe's release.tolerances got worse; else only judge it."


class RetrainingSettings(BaseModel):
    """What the schedule and the sensor start, and when; a run from the Launchpad may differ."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cron: str = Field("0 3 * * 0", description="when the schedule, once it is on, starts a run per model")
    timezone: str = Field("UTC", description="of cron, e.g. Europe/Berlin")
    mode: Mode = Field("full", description=MODE_HELP)
    promote: bool = Field(True, description=PROMOTE_HELP)
    fresh_days: float = Field(14, gt=0, description="a release older than this is shown as overdue")

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, value: str) -> str:
        try:
            ScheduleDefinition(job_name="any", cron_schedule=value)
        except DagsterInvalidDefinitionError:
            raise ValueError('not a cron string of five fields, such as "0 3 * * 0"') from None
        return value

    @field_validator("timezone")
    @classmethod
    def _is_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ValueError, OSError, KeyError):
            raise ValueError("no time zone of that name, such as UTC or Europe/Berlin") from None
        return value


def retraining_settings(project: Project) -> RetrainingSettings:
    """The settings of a project; what params.yaml leaves out has its default.

    Raises:
        RefragError: params.yaml has a wrong key or value there.
    """
    values = project.params().get("retraining") or {}
    try:
        return RetrainingSettings.model_validate(values)
    except ValidationError as error:
        faults = explain(error, RetrainingSettings, "retraining")
        raise RefragError(f"{project.root / 'params.yaml'}:\n{faults}") from None
