"""Sound artifacts of every stage, made once; a test plants its fault in a copy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from refrag_platform.project import Project
from refrag_platform.quality.checks import CheckResult, check_artifact
from refrag_platform.recipes import Recipe
from refrag_platform.stages import STAGES
from tests.conftest import ROOT
from tests.quality.content import write

MODEL = "tiny"
Examine = Callable[..., dict[str, CheckResult]]
Plant = Callable[[Path], object]


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return Project(ROOT).recipe(MODEL)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> dict[str, Path]:
    """Content folder of each stage's artifact."""
    folder = tmp_path_factory.mktemp("sound")
    made: dict[str, Path] = {}
    for name, stage in STAGES.items():
        inputs = {before: made[before] for before in stage.inputs}
        write(name, recipe, Project(ROOT).recipe_path(MODEL).parent, folder / name, inputs)
        made[name] = folder / name
    return made


@pytest.fixture
def examine(tmp_path: Path, recipe: Recipe, sound: dict[str, Path]) -> Examine:
    """`examine(stage, plant)`: results by name for a copy of a sound artifact in which `plant` left a fault."""

    def run(
        stage: str, plant: Plant | None = None, maturity: str = "undertrained", docs: Path | None = None
    ) -> dict[str, CheckResult]:
        content = tmp_path / "content"
        shutil.copytree(sound[stage], content)
        if plant is not None:
            plant(content)
        inputs = {name: sound[name] for name in STAGES[stage].inputs}
        used = recipe.model_copy(update={"maturity": maturity})
        return {result.name: result for result in check_artifact(stage, used, content, inputs, docs)}

    return run
