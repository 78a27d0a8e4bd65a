"""params.yaml names the models that DVC and Dagster run; adding one leaves everything else in it alone."""

from __future__ import annotations

import pytest
import yaml
from typer.testing import CliRunner

from refrag_platform import runner, stages
from refrag_platform.cli import app
from refrag_platform.dials import add_model, only_model, require_named, set_override
from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.project import Project
from tests.planted import MODEL, plant, run

SECTIONS = list(dict.fromkeys(section for stage in stages.STAGES.values() for section in stage.sections))
NOTHING = {section: {} for section in SECTIONS}
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
    assert after["overrides"] == {**(before.get("overrides") or {}), MODEL: NOTHING}
    comments = [line[line.index("#") :] for line in text.splitlines() if "#" in line]
    assert [line[line.index("#") :] for line in dials.read_text().splitlines() if "#" in line] == comments
    assert not add_model(project, MODEL), "it is there now"


def test_the_settings_of_a_model_that_is_added_again_stay(project: Project) -> None:
    (project.root / "params.yaml").write_text(f"models: []\noverrides:\n  {MODEL}: {{cpt: {{steps: 7}}}}\n")
    add_model(project, MODEL)
    assert project.params() == {"models": [MODEL], "overrides": {MODEL: {"cpt": {"steps": 7}}}}
    assert project.recipe(MODEL).cpt.steps == 7


def test_a_recipe_that_leaves_out_what_dvc_watches_is_refused_with_what_to_write(project: Project) -> None:
    recipe = project.recipe_path(MODEL)
    recipe.write_text("\n".join(line for line in recipe.read_text().splitlines() if not line.startswith("serving:")))
    before = (project.root / "params.yaml").read_text()
    with pytest.raises(RecipeError, match=r"`serving: \{\}`"):
        add_model(project, MODEL)
    assert (project.root / "params.yaml").read_text() == before
    with pytest.raises(RecipeError, match="no model 'unknown'"):
        add_model(project, "unknown")


@pytest.mark.parametrize(
    "models", ["models: [tiny, other]\n", "models:\n  - tiny  # first\n  - other\n", "models:\n- tiny\n- other\n"]
)
def test_a_file_can_be_cut_down_to_one_model(project: Project, models: str) -> None:
    (project.root / "params.yaml").write_text(f"# The dials\n{models}# Below\noverrides: {{}}\n")
    (project.root / "params.yaml").write_text(only_model(project, MODEL))
    assert project.params() == {"models": [MODEL], "overrides": {}}
    assert "# Below\n" in (project.root / "params.yaml").read_text()


SETTINGS = {
    "nothing": "{}",
    "on one line": "{steps: 7, seed: 1}  # few",
    "in lines": "\n      steps: 7  # few\n      seed: 1",
    "as the last of many": "{steps: 7, continue_from: v9}",
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_key_can_be_set_changed_and_taken_away_again(project: Project, settings: str) -> None:
    text = f"models: [{MODEL}]\noverrides:\n  {MODEL}:\n    cpt: {settings}\n    chunks: {{}}\n# End\n"
    dials = project.root / "params.yaml"
    dials.write_text(text)
    plain = yaml.safe_load(text)["overrides"][MODEL]
    for version in ("v1.0.0", "v1.1.0"):
        assert set_override(project, MODEL, "continue_from", {"cpt": version, "chunks": version})
        changed = {name: {**values, "continue_from": version} for name, values in plain.items()}
        assert project.params()["overrides"][MODEL] == changed
        assert not set_override(project, MODEL, "continue_from", {"cpt": version, "chunks": version})
    assert set_override(project, MODEL, "continue_from", {"cpt": None, "chunks": None})
    plain["cpt"].pop("continue_from", None)
    assert project.params()["overrides"][MODEL] == plain
    assert dials.read_text().count("#") == text.count("#")
    if "v9" not in settings:
        assert dials.read_text() == text


def test_a_section_that_is_not_there_is_not_set(project: Project) -> None:
    (project.root / "params.yaml").write_text(f"models: [{MODEL}]\noverrides: {{{MODEL}: {{cpt: {{}}}}}}\n")
    with pytest.raises(RefragError, match=rf"no overrides.{MODEL}.chunks; `refrag recipes add {MODEL}`"):
        set_override(project, MODEL, "continue_from", {"cpt": "v1.0.0", "chunks": "v1.0.0"})
    assert project.params()["overrides"][MODEL] == {"cpt": {}}


def test_the_command_adds_a_model_that_dvc_then_runs(repository: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository.root / "params.yaml").write_text("models: []\noverrides: {}\n")
    monkeypatch.chdir(repository.root)
    with pytest.raises(RefragError, match=rf"models names none, not '{MODEL}'.*`refrag recipes add {MODEL}`"):
        require_named(repository, MODEL)
    result = CliRunner().invoke(app, ["recipes", "add", MODEL])
    assert result.exit_code == 0, result.output
    require_named(repository, MODEL)
    assert f"corpus@{MODEL}" in run(repository.root, "dvc", "stage", "list")


def test_a_run_without_dvc_needs_no_name_in_the_file(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    (project.root / "params.yaml").write_text("models: []\noverrides: {}\n")
    assert not runner.run_stage(project, "corpus", MODEL).cached
