"""What an artifact says of its training is what its settings and figures say together."""

from typing import Any

import pytest

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.lineage.origin import origin
from refrag_platform.project import Project
from refrag_platform.stages import STAGES, settings_of
from tests.candidates import manifest_of
from tests.conftest import ROOT


def manifest(stage: str, steps: int | None, **changes: Any) -> Manifest:
    """A manifest of a recipe whose section `stage` has these changes."""
    recipe = Project(ROOT).recipe("tiny")
    section = getattr(recipe, stage, None)
    if section is not None:
        recipe = recipe.model_copy(update={stage: section.model_copy(update=changes)})
    metrics = {} if steps is None else {"steps": steps}
    return manifest_of(stage, settings=settings_of(STAGES[stage], recipe), metrics=metrics)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (manifest("reconstruction", 40), "40 steps, the decoder frozen"),
        (manifest("reconstruction", 40, train_decoder=True), "40 steps, the decoder trained too"),
        (
            manifest("reconstruction", 1000, continue_from="release", train_decoder=False),
            "1,000 steps; taken as it is from models/tiny/release",
        ),
        (
            manifest("reconstruction", 1000, continue_from="v1.2.0"),
            "1,000 steps; taken as it is from tiny@v1.2.0",
        ),
        (manifest("cpt", 200, continue_from="v1.2.0"), "200 steps, on from tiny@v1.2.0"),
        (manifest("cpt", 1200, continue_from="release"), "1,200 steps; taken as it is from models/tiny/release"),
        (manifest("finetuned", 20), "20 steps"),
        (manifest("chunks", None), None),
    ],
)
def test_how_a_checkpoint_came_to_be(made: Manifest, said: str | None) -> None:
    assert origin(made) == said


def test_settings_of_a_training_that_did_not_take_place_are_not_kept() -> None:
    """They would contradict the figures, and a change of them would make again what stays the same."""
    assert manifest("reconstruction", 1000, continue_from="release").settings["reconstruction"] == {
        "continue_from": "release",
        "precision": "fp32",
    }
    trained_on = manifest("cpt", 200, continue_from="v1.2.0").settings["cpt"]
    assert trained_on["steps"] == Project(ROOT).recipe("tiny").cpt.steps
