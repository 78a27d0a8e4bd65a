"""What checks found is remembered for as long as it is true, and no longer."""

from collections.abc import Callable
from pathlib import Path

import pytest

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import InputRecord
from refrag_platform.errors import ArtifactError
from refrag_platform.quality import checks, results
from refrag_platform.quality.checks import check_once
from refrag_platform.quality.results import DOCS_FOLDER, RESULTS_FILE, read_results
from refrag_platform.recipes import Recipe
from tests.candidates import manifest_of
from tests.quality.content import write_evaluation

Change = Callable[["Checked"], None]


class Checked:
    """An evaluation in a folder of its own, as the runner and the assets look at it; counts real examinations."""

    def __init__(self, folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.recipe, self.monkeypatch = folder, recipe, monkeypatch
        self.examined, self.inputs = 0, {"finetuned": "1.dir"}
        (folder / "content").mkdir(parents=True)
        write_evaluation(recipe, folder / "content")
        examine = checks.check_artifact

        def count(*arguments: object) -> object:
            self.examined += 1
            return examine(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(checks, "check_artifact", count)

    def look(self) -> list[results.CheckResult]:
        inputs = {name: InputRecord(path=name, hash=value) for name, value in self.inputs.items()}
        manifest = manifest_of("evaluation", hash=folder_digest(self.folder / "content"), inputs=inputs)
        return check_once(self.recipe, manifest, self.folder, {})


@pytest.fixture
def checked(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Checked:
    return Checked(tmp_path / "evaluation", recipe, monkeypatch)


def test_the_same_artifact_is_examined_once(checked: Checked) -> None:
    first = checked.look()
    assert checked.look() == first == read_results(checked.folder / DOCS_FOLDER)
    assert checked.examined == 1


def test_a_fault_of_the_same_size_is_found(checked: Checked) -> None:
    assert all(result.passed for result in checked.look())
    report = checked.folder / "content" / "rag.json"
    faulty = report.read_text().replace('"f1": 0.6', '"f1": 6.0')
    assert len(faulty) == report.stat().st_size and faulty != report.read_text()
    report.write_text(faulty)
    assert [result.name for result in checked.look() if not result.passed] == ["rag_f1"]


def edit_recipe(checked: Checked) -> None:
    checked.recipe = checked.recipe.model_copy(update={"maturity": "released"})


def edit_input(checked: Checked) -> None:
    checked.inputs["finetuned"] = "2.dir"


def edit_checks(checked: Checked) -> None:
    checked.monkeypatch.setattr(results, "code_digest", lambda root, paths: "other checks")


def cut_off(checked: Checked) -> None:
    path = checked.folder / DOCS_FOLDER / RESULTS_FILE
    path.write_bytes(path.read_bytes()[:-20])


def remove(checked: Checked) -> None:
    (checked.folder / DOCS_FOLDER / RESULTS_FILE).unlink()


@pytest.mark.parametrize("change", [edit_recipe, edit_input, edit_checks, cut_off, remove])
def test_it_is_examined_again_once_anything_changed_that_decides(checked: Checked, change: Change) -> None:
    checked.look()
    change(checked)
    checked.look()
    checked.look()
    assert checked.examined == 2


def test_results_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"results.json holds no results of checks"):
        read_results(tmp_path)
