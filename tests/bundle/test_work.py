"""What goes to the other machine: what its stages read, by the place that it has here, and no more."""

import re
from pathlib import Path

import pytest

from refrag_platform import runner
from refrag_platform.bundle.work import work_to_do
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.history.freshness import dependencies
from refrag_platform.project import Project
from tests.bundle.conftest import SendOut
from tests.command import refused
from tests.planted import MODEL, override

QUESTION = '{"id": "1", "question": "Where?", "answers": ["North"], "passages": [], "gold": []}\n'


def held(project: Project, until: str, wheels: Path | None = None) -> set[str]:
    with work_to_do(project, [MODEL], until, wheels) as work:
        return set(work.members)


def test_only_what_is_not_current_is_to_be_run_and_only_its_inputs_go(home: Project) -> None:
    first = held(home, "finetuned")
    assert {"params.yaml", "models/tiny/recipe.yaml", "models/tiny/tokenizer.json"} <= first
    assert {"refrag_platform/runner.py", "data/tiny/corpus/manifest.json"} <= first
    assert {"data/tiny/corpus/content/train.json", "data/tiny/corpus/content/train/tokens-00000.bin"} <= first
    assert not [name for name in first if name.startswith(("models/llama", "data/sources", "assets/", "work/"))]
    for stage in ("reconstruction", "cpt"):
        runner.run_stage(home, stage, MODEL)
    with work_to_do(home, [MODEL], "policy") as work:
        assert work.facts["models"] == {MODEL: ["finetuned", "policy"]}
    assert "models/tiny/cpt/manifest.json" in work.members
    assert not [name for name in work.members if name.startswith("models/tiny/reconstruction/")]


def test_files_of_the_recipe_go_along_and_others_are_refused(home: Project, tmp_path: Path) -> None:
    (home.root / "more.jsonl").write_text(QUESTION)
    override(home, "finetuned", {"questions": ["more.jsonl"]})
    assert "more.jsonl" in held(home, "finetuned") and "more.jsonl" not in held(home, "cpt")
    override(home, "cpt", {"accelerate_config": "../accelerate/zero3-node.yaml"})
    assert {f"models/accelerate/zero3-node.{kind}" for kind in ("yaml", "json")} <= held(home, "cpt")
    outside = tmp_path / "outside.jsonl"
    outside.write_text(QUESTION)
    override(home, "policy", {"question_share": 0.5, "questions": [str(outside)]})
    with pytest.raises(RefragError, match=f"policy of tiny reads {outside}, which is not a file or folder of"):
        held(home, "policy")


@pytest.mark.parametrize("given", ["$MORE/more.jsonl", "${MORE}/more.jsonl", "~/more.jsonl", "{root}/more.jsonl"])
def test_a_path_that_leads_elsewhere_on_another_machine_is_refused_by_name(
    home: Project, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    for variable in ("MORE", "HOME"):
        monkeypatch.setenv(variable, str(home.root))
    (home.root / "more.jsonl").write_text(QUESTION)
    name = given.format(root=home.root) if "root" in given else given
    override(home, "finetuned", {"questions": [name]})
    assert "more.jsonl" not in held(home, "cpt")
    with pytest.raises(RefragError, match=rf"finetuned of tiny reads {re.escape(name)}: another machine has other"):
        held(home, "finetuned")
    (home.root / "models" / "tiny" / "retriever").mkdir()
    override(home, "finetuned", {})
    override(home, "chunks", {"retriever": f"path:{name.replace('more.jsonl', 'models/tiny/retriever')}"})
    with pytest.raises(RefragError, match=r"path:.*: another machine has other variables"):
        held(home, "chunks")


def test_sources_are_read_here_alone_and_may_lie_anywhere(
    home: Project, send_out: SendOut, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    monkeypatch.setenv("MY_TEXTS", str(tmp_path / "texts"))
    override(home, "corpus", {"sources": [{"kind": "files", "path": "$MY_TEXTS"}]})
    runner.run_stage(home, "corpus", MODEL)
    there = send_out()
    monkeypatch.delenv("MY_TEXTS")
    made = runner.run_stage(there, "reconstruction", MODEL).manifest
    assert made.fingerprint == dependencies(home, "reconstruction", home.recipe(MODEL)).fingerprint


def test_wheels_go_along(home: Project, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with pytest.raises(RefragError, match="there is no wheel"):
        held(home, "cpt", tmp_path / "wheels")
    # The second as it is built here.
    taken = ["pydantic-2.12-py3-none-any.whl", "deepspeed-0.19.8-py3-none-any.whl"]
    for wheel in taken:
        (tmp_path / "wheels" / wheel).touch()
    first = held(home, "cpt", tmp_path / "wheels")
    assert {*(f"wheels/{wheel}" for wheel in taken), "data/tiny/corpus/passages.jsonl"} <= first
    (tmp_path / "wheels" / "pyarrow-21.0.0-cp312-cp312-manylinux_2_28_x86_64.whl").touch()
    with_pyarrow = held(home, "cpt", tmp_path / "wheels")
    assert "data/tiny/corpus/passages.jsonl" not in with_pyarrow, "it reads the table itself"


def test_an_installed_package_of_weights_goes_along(home: Project) -> None:
    recipe = home.recipe_path(MODEL)
    recipe.write_text(recipe.read_text().replace("retriever: hash", 'retriever: "package:typer"'))
    assert "site-packages/typer/__init__.py" in held(home, "chunks")
    recipe.write_text(recipe.read_text().replace("package:typer", "package:no-such-weights"))
    with pytest.raises(RefragError, match="package no-such-weights is not installed; install it, or put its wheel"):
        held(home, "chunks")


def test_what_cannot_run_there_is_refused_with_what_to_do(home: Project) -> None:
    with pytest.raises(RefragError, match="--until is 'package'; on another machine these stages can run: reconstr"):
        held(home, "package")
    override(home, "cpt", {"continue_from": "v1.0.0"})
    override(home, "reconstruction", {"continue_from": "v1.0.0"})
    with pytest.raises(RefragError, match=r"reconstruction\.continue_from of tiny is 'v1\.0\.0': a released version"):
        held(home, "cpt")
    override(home, "corpus", {"passage_tokens": 32})
    with pytest.raises(ArtifactError, match=r"corpus of tiny is not current, .*`refrag run corpus --model tiny`"):
        held(home, "cpt")


def test_with_nothing_to_do_it_says_so(home: Project) -> None:
    runner.run_stage(home, "reconstruction", MODEL)
    with pytest.raises(RefragError, match="nothing to do: reconstruction of tiny is current"):
        held(home, "reconstruction")


def test_a_stage_that_runs_here_is_not_sent_away(home: Project) -> None:
    with (
        work_to_do(home, [MODEL], "reconstruction"),
        pytest.raises(RefragError, match="another process is running this stage"),
    ):
        runner.run_stage(home, "reconstruction", MODEL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--results", "--model", MODEL], "--model: --results takes what was made here"),
        (["--model", MODEL, "--part", "1"], "--part is 1: a part has as many files as --files allows"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    home: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("REFRAG_ROOT", str(home.root))
    assert message in refused("bundle", "export", "--out", tmp_path / "out", *arguments)
