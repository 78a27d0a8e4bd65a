"""Controls: the plain decoders that a model is held against, declared in its recipe and trained by its own stages.

The control KIND of the model NAME is called NAME--KIND. Its recipe is the model's, but for what its decoder reads and
for where it starts: from the decoder as it was before any training here, or where a model that goes on from packed
weights does, from theirs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from refrag_platform.recipes.base import Section

# full: all text. none: no context. truncated: the last tokens of the context, as many as REFRAG's takes positions.
# plain: the first tokens of the passages, nearest to the question first, as many as REFRAG's take positions.
Control = Literal["full", "none", "truncated", "plain"]
TrainedSystem = Literal["refrag", Control]
MARK = "--"
# The stages that a control has of its own; all else that they need is the model's.
CONTROL_STAGES = ("cpt", "finetuned")


class ControlRecipe(Section):
    """How a control is trained: as its model, but for what is said here, or in overrides of its own name."""

    start: Literal["untrained", "release"] = Field(
        "untrained",
        description="where its cpt starts: the decoder before any training here; `release`: that of the weights in "
        "models/NAME/release, as for a model with continue_from: release",
    )
    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=list,
        description="peaks of the decoder in fine-tuning, each of which is tried: the best on validation questions is "
        "kept; none: the model's own",
    )


class ControlName(NamedTuple):
    """The two parts of a control's name."""

    model: str
    kind: str


def control_name(model: str, kind: str) -> str:
    return f"{model}{MARK}{kind}"


def split_name(name: str) -> ControlName | None:
    """The parts of a control's name; None of any other."""
    model, mark, kind = name.rpartition(MARK)
    return ControlName(model, kind) if model and mark else None


def control_settings(name: str, kind: str) -> dict[str, Any]:
    """What a control's recipe says otherwise than its model's: its weights are nobody else's."""
    return {
        "name": name,
        "system": kind,
        "reconstruction": {"continue_from": None},
        "cpt": {"continue_from": None},
        "policy": {"continue_from": None},
    }
