"""How retraining runs by itself, and where: sections of params.yaml, typed and checked.

retraining: {cron: "0 3 * * 0", timezone: Europe/Berlin, mode: continue, promote: true, fresh_days: 14}
elsewhere: {command: "scripts/on_gpu.sh {bundle} {results}", stages: [reconstruction, cpt]}
"""

from typing import Literal, TypeVar
from zoneinfo import ZoneInfo

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from refrag_platform.errors import RefragError
from refrag_platform.faults import explain
from refrag_platform.project import Project

Mode = Literal["full", "continue"]
SettingsT = TypeVar("SettingsT", bound=BaseModel)
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
            dg.ScheduleDefinition(job_name="any", cron_schedule=value)
        except dg.DagsterInvalidDefinitionError:
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


class ElsewhereSettings(BaseModel):
    """Stages that Dagster runs on another machine, and the command that does it (docs/other-machines.md)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: str = Field(description="of `refrag bundle run`: takes the work there and brings the results back")
    stages: tuple[Literal["reconstruction", "cpt", "chunks", "policy", "finetuned", "evaluation"], ...] = Field(
        ("reconstruction", "cpt", "finetuned", "policy"), description="the others run here"
    )
    wheels: str | None = Field(None, description="folder of wheels to take along, relative to the project")


def elsewhere_settings(project: Project) -> ElsewhereSettings | None:
    """The section `elsewhere` of params.yaml; None where it has none, and every stage runs here.

    Raises:
        RefragError: params.yaml has a wrong key or value there.
    """
    return _section(project, "elsewhere", ElsewhereSettings) if project.params().get("elsewhere") else None


def retraining_settings(project: Project) -> RetrainingSettings:
    """The settings of a project; what params.yaml leaves out has its default.

    Raises:
        RefragError: params.yaml has a wrong key or value there.
    """
    return _section(project, "retraining", RetrainingSettings)


def _section(project: Project, name: str, kind: type[SettingsT]) -> SettingsT:
    try:
        return kind.model_validate(project.params().get(name) or {})
    except ValidationError as error:
        raise RefragError(f"{project.root / 'params.yaml'}:\n{explain(error, kind, name)}") from None
