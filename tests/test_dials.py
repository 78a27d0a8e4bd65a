"""params.yaml names the models that DVC and Dagster run; adding one leaves everything else in it alone."""

import pytest
import yaml

from refrag_platform import runner
from refrag_platform.dials import add_model, only_models, require_named
from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.project import Project
from tests.command import refrag
from tests.planted import MODEL, plant, run

LAYOUTS = {
    "as shipped": "# Dials\nmodels: [other]  # one\n\noverrides:\n  # Mine\n  other:\n    cpt: {steps: 7}  # few\n",
    "lists": "models:\n  - other  # first\noverrides:\n    other: {cpt: {steps: 7}}",
    "on one line": "{models: [other], overrides: {other: {cpt: {steps: 7}}}}\n",
    "empty": "models: []\noverrides: {}\n# End\n",
    "nothing below": "models: []\noverrides:\n# End\n",
    "no overrides": "models: [other]\n",
}


@pytest.mark.parametrize("text", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_adding_a_model_changes_nothing_else(project: Project, text: str) -> None:
    dials = project.root / "params.yaml"
    dials.write_text(text)
    before = yaml.safe_load(text)
    assert add_model(project, MODEL)
    after = yaml.safe_load(dials.read_text())
    assert after["models"] == [*(before["models"] or []), MODEL]
    assert after["overrides"] == {**(before.get("overrides") or {}), MODEL: {}}
    comments = [line[line.index("#") :] for line in text.splitlines() if "#" in line]
    assert [line[line.index("#") :] for line in dials.read_text().splitlines() if "#" in line] == comments
    assert not add_model(project, MODEL), "it is there now"


def test_the_settings_of_a_model_that_is_added_again_stay(project: Project) -> None:
    (project.root / "params.yaml").write_text(f"models: []\noverrides:\n  {MODEL}: {{cpt: {{steps: 7}}}}\n")
    add_model(project, MODEL)
    assert project.params() == {"models": [MODEL], "overrides": {MODEL: {"cpt": {"steps": 7}}}}
    assert project.recipe(MODEL).cpt.steps == 7


def test_a_model_without_a_recipe_is_refused(project: Project) -> None:
    before = (project.root / "params.yaml").read_text()
    with pytest.raises(RecipeError, match="no model 'unknown'"):
        add_model(project, "unknown")
    assert (project.root / "params.yaml").read_text() == before


@pytest.mark.parametrize(
    "models", ["models: [tiny, other]\n", "models:\n  - tiny  # first\n  - other\n", "models:\n- tiny\n- other\n"]
)
def test_a_file_can_be_cut_down_to_one_model(project: Project, models: str) -> None:
    (project.root / "params.yaml").write_text(f"# The dials\n{models}# Below\noverrides: {{}}\n")
    (project.root / "params.yaml").write_text(only_models(project, [MODEL]))
    assert project.params() == {"models": [MODEL], "overrides": {}}
    assert "# Below\n" in (project.root / "params.yaml").read_text()


def test_the_command_adds_a_model_that_dvc_then_runs(repository: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository.root / "params.yaml").write_text("models: []\noverrides: {}\n")
    monkeypatch.chdir(repository.root)
    with pytest.raises(RefragError, match=rf"models names none, not '{MODEL}'.*`refrag recipes add {MODEL}`"):
        require_named(repository, MODEL)
    refrag("recipes", "add", MODEL)
    require_named(repository, MODEL)
    assert f"corpus@{MODEL}" in run(repository.root, "dvc", "stage", "list")


def test_a_run_without_dvc_needs_no_name_in_the_file(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    (project.root / "params.yaml").write_text("models: []\noverrides: {}\n")
    assert not runner.run_stage(project, "corpus", MODEL).cached
