"""dvc.yaml says what refrag_platform/stages.py says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from refrag_platform.project import Project
from refrag_platform.stages import STAGES
from tests.conftest import ROOT

MODEL = "${item.model}"
PROJECT = Project(ROOT)
PIPELINE: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())


def content(stage: str) -> str:
    return PROJECT.content(stage, MODEL).relative_to(ROOT).as_posix()


def test_the_stages_are_those_of_the_registry_in_the_same_order() -> None:
    assert list(PIPELINE["stages"]) == list(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_the_registrys_inputs_code_settings_and_output(name: str) -> None:
    stage, written = STAGES[name], PIPELINE["stages"][name]
    sources = [f"data/sources/{MODEL}"] if name == "corpus" else []
    settings = {f"models/{MODEL}/recipe.yaml": [*stage.sections, "seed"]}
    assert written["matrix"] == {"model": "${models}"}
    assert written["desc"] == stage.title
    assert written["cmd"] == f"${{run}} {name} --model {MODEL}"
    assert written["deps"] == [*sources, *(content(name) for name in stage.inputs), *stage.code]
    assert written["params"] == [settings, *(f"overrides.{MODEL}.{section}" for section in stage.sections)]
    assert written["outs"] == [{content(name): {"persist": True}}]


@pytest.mark.parametrize("name", ["reconstruction", "cpt", "policy", "finetuned"])
def test_a_change_of_any_training_module_that_a_stage_reads_makes_it_again(name: str) -> None:
    code = STAGES[name].code
    files = [ROOT / path for path in code if path.startswith("refrag_platform/training/") and path.endswith(".py")]
    read = {found for file in files for found in re.findall(r"refrag_platform\.training\.(\w+)", file.read_text())}
    # Of cpt fine-tuning takes the name of a type alone.
    assert files and {f"refrag_platform/training/{module}.py" for module in read - {"core", "cpt"}} <= set(code)


@pytest.mark.parametrize("model", PROJECT.models())
def test_every_section_that_dvc_watches_is_written_down(model: str) -> None:
    """DVC refuses a key that is not there, even where the default would do."""
    watched = {section for stage in STAGES.values() for section in stage.sections}
    recipe = yaml.safe_load(PROJECT.recipe_path(model).read_text())
    assert watched | {"seed"} <= set(recipe)
    assert watched <= set(PROJECT.params()["overrides"][model])
