"""dvc.yaml says what refrag_platform/stages.py says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from refrag_platform.project import Project
from refrag_platform.stages import STAGES
from refrag_platform.versioning.digest import code_digest
from tests.conftest import ROOT
from tests.versioning.imports import covered, imported, reachable

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


# What changes no byte of an artifact: it records, checks, shows and runs. Settings are compared by their values.
NO_PART = frozenset(
    {
        *(f"refrag_platform/{name}" for name in ("bench", "cli", "quality", "recipes", "versioning")),
        *(f"refrag_platform/{name}.py" for name in ("dials", "errors", "faults", "processes", "progress", "project")),
        *(f"refrag_platform/{name}.py" for name in ("publication", "quiet", "runner", "stages")),
        # Refuses a decoder, or lets it be.
        "refrag_platform/agreement.py",
        # The text beside a packed release.
        "refrag_platform/compact/card.py",
    }
)


@pytest.mark.parametrize("name", STAGES)
def test_a_change_of_any_module_that_a_stage_may_run_makes_it_again(name: str) -> None:
    stage = STAGES[name]
    read = reachable(stage.function.split(":")[0], without=NO_PART)
    missing = sorted(str(file) for file in read if not covered(file, frozenset(stage.code)))
    assert not missing, f"add to the code of {name} in stages.py and dvc.yaml"


@pytest.mark.parametrize("name", STAGES)
def test_every_code_that_a_stage_names_is_read_by_it(name: str) -> None:
    stage = STAGES[name]
    read = reachable(stage.function.split(":")[0], without=NO_PART)
    named = {path for path in stage.code if path.startswith("refrag_platform")}
    assert {path for path in named if not any(covered(file, frozenset({path})) for file in read)} == set()


@pytest.mark.parametrize(
    ("stage", "path"),
    [
        *((stage, "compact/coding.py") for stage in ("reconstruction", "cpt", "policy")),
        ("finetuned", "corpus/swapping.py"),
        ("evaluation", "training/core/packed.py"),
    ],
)
def test_what_a_stage_imports_in_passing_is_its_code_too(project: Project, stage: str, path: str) -> None:
    before = code_digest(project.root, STAGES[stage].code)
    with (project.root / "refrag_platform" / path).open("a") as stream:
        stream.write("# changed\n")
    assert code_digest(project.root, STAGES[stage].code) != before


def test_imports_are_found_wherever_they_stand() -> None:
    found = imported(Path("refrag_platform/compact/release.py"))
    assert {Path("refrag_platform/compact/card.py"), Path("refrag_platform/compact/coding.py")} <= found
    # Of cpt fine-tuning takes the name of a type alone.
    assert Path("refrag_platform/training/cpt.py") not in imported(Path("refrag_platform/training/finetuned.py"))


@pytest.mark.parametrize("model", PROJECT.models())
def test_every_section_that_dvc_watches_is_written_down(model: str) -> None:
    """DVC refuses a key that is not there, even where the default would do."""
    watched = {section for stage in STAGES.values() for section in stage.sections}
    recipe = yaml.safe_load(PROJECT.recipe_path(model).read_text())
    assert watched | {"seed"} <= set(recipe)
    assert watched <= set(PROJECT.params()["overrides"][model])
