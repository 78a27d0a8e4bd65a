"""dvc.yaml says what refrag_platform/stages.py and the imports of the stages say."""

from typing import Any

import pytest
import yaml

from refrag_platform.history.pipeline import RECIPE, pipeline_text, write_pipeline
from refrag_platform.project import Project
from refrag_platform.recipes import read_layer
from refrag_platform.stages import STAGES
from tests.conftest import ROOT

MODEL = "${item.model}"
PROJECT = Project(ROOT)
PIPELINE: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())


def content(stage: str) -> str:
    return PROJECT.content(stage, MODEL).relative_to(ROOT).as_posix()


def modules(dependency: str) -> list[str]:
    """The files of code that a dependency stands for."""
    path = ROOT / dependency
    return [file.relative_to(ROOT).as_posix() for file in path.rglob("*.py")] if path.is_dir() else [dependency]


def test_dvc_yaml_is_up_to_date() -> None:
    assert (ROOT / "dvc.yaml").read_text() == pipeline_text(PROJECT), "run `refrag pipeline`"


def test_the_stages_are_those_of_the_registry_in_the_same_order() -> None:
    assert list(PIPELINE["stages"]) == [RECIPE, *STAGES]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_the_registrys_inputs_settings_and_output_and_the_code_that_it_runs(name: str) -> None:
    stage, written = STAGES[name], PIPELINE["stages"][name]
    made = [f"data/sources/{MODEL}"] if name == "corpus" else [content(put) for put in stage.inputs]
    assert written["matrix"] == {"model": "${models}"}
    assert written["desc"] == stage.title
    assert written["cmd"] == f"${{refrag}} run {name} --model {MODEL}"
    assert written["deps"][: len(made)] == made
    code = [file for dependency in written["deps"][len(made) :] for file in modules(dependency)]
    assert sorted(code) == list(stage.code(ROOT))
    assert written["params"] == [{f"models/{MODEL}/run/recipe.yaml": [*stage.sections, "seed"]}]
    assert written["outs"] == [{content(name): {"persist": True}}]


def test_what_else_is_in_dvc_yaml_stays_where_its_stages_are_written(project: Project) -> None:
    path = project.root / "dvc.yaml"
    wanted = path.read_text() + "\nartifacts:\n  tiny: {path: models/tiny, type: model}\n"
    path.write_text(wanted.replace("      - refrag_platform/weights.py\n", "").replace("desc: Bento", "desc: Bread"))
    assert write_pipeline(project)
    assert path.read_text() == wanted
    assert not write_pipeline(project)


def test_settings_come_out_of_one_stage_which_depends_on_every_file_that_they_are_written_in() -> None:
    written = PIPELINE["stages"][RECIPE]
    assert written["outs"] == [{f"models/{MODEL}/run/recipe.yaml": {"cache": False, "persist": True}}]
    assert written["params"] == [f"overrides.{MODEL}"]
    assert set(PROJECT.models()) <= set(PROJECT.params()["overrides"]), "DVC refuses a key that is not there"
    extends = {read_layer(PROJECT.recipe_path(model)).values.get("extends") for model in PROJECT.recipes()}
    for name in (MODEL, *filter(None, extends)):
        assert f"models/{name}/recipe.yaml" in written["deps"]
