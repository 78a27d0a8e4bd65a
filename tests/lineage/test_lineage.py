"""`refrag lineage` prints the chain behind an artifact from manifests alone."""

import json
import shutil

import pytest

from refrag_platform import runner
from refrag_platform.artifacts.digest import file_digest
from refrag_platform.artifacts.manifest import FILE_NAME, Manifest
from refrag_platform.errors import ArtifactError
from refrag_platform.history.status import status
from refrag_platform.lineage.lineage import trace
from refrag_platform.project import Project
from refrag_platform.stages import STAGES
from tests.command import refrag
from tests.planted import MODEL, make_all


def lineage(project: Project, *arguments: str) -> str:
    return refrag("lineage", project.stage_dir("finetuned", MODEL), *arguments).stdout


def test_no_line_of_settings_or_figures_is_longer_than_a_screen(planted_project: Project) -> None:
    hashes = make_all(planted_project)
    printed = lineage(planted_project)
    assert f"models/{MODEL}/finetuned {hashes['finetuned']}" in printed
    assert f"steps {planted_project.recipe(MODEL).finetuned.steps}, batch_size" in printed
    paths = [line for line in printed.splitlines() if ".dir" in line or "commit" in line]
    assert max(len(line) for line in printed.splitlines() if line not in paths) <= 120


def test_the_chain_of_the_fine_tuned_model_ends_at_the_source_files(planted_project: Project) -> None:
    hashes = make_all(planted_project)
    chain = json.loads(lineage(planted_project, "--json"))
    corpus = chain["inputs"]["cpt"]["inputs"]["reconstruction"]["inputs"]["corpus"]
    assert {chain["hash"], corpus["hash"]} == {hashes["finetuned"], hashes["corpus"]}
    assert chain["path"] == f"models/{MODEL}/finetuned"
    assert chain["settings"]["finetuned"]["steps"] == planted_project.recipe(MODEL).finetuned.steps
    assert chain["metrics"]["loss"] == 1.5
    source = planted_project.source_dir(MODEL) / "notes.txt"
    path = f"data/sources/{MODEL}/notes.txt"
    record = {"path": path, "hash": file_digest(source), "changed_since": False, "behind": []}
    assert record in corpus["sources"]
    tokenizers = {f"models/{MODEL}/tokenizer.json", f"models/{MODEL}/tokenizer_config.json"}
    assert {entry["path"] for entry in corpus["sources"]} == {record["path"], *tokenizers}


def test_the_tree_shows_every_artifact_behind_it_with_its_hash(planted_project: Project) -> None:
    hashes = make_all(planted_project)
    printed = lineage(planted_project)
    for stage in ("finetuned", "cpt", "reconstruction", "corpus"):
        assert f"{planted_project.stage_dir(stage, MODEL).relative_to(planted_project.root)} {hashes[stage]}" in printed
    assert "notes.txt" in printed
    assert "chunks" not in printed
    assert "since" not in printed


def test_one_changed_byte_of_a_source_changes_every_hash_down_the_chain(planted_project: Project) -> None:
    before = make_all(planted_project)
    source = planted_project.source_dir(MODEL) / "notes.txt"
    source.write_bytes(source.read_bytes().replace(b"north", b"South"))
    after = make_all(planted_project)
    assert [stage for stage in STAGES if before[stage] == after[stage]] == []


def test_an_input_that_was_replaced_since_is_marked(planted_project: Project) -> None:
    before = make_all(planted_project)
    (planted_project.source_dir(MODEL) / "notes.txt").write_text("Another river.")
    after = runner.run_stage(planted_project, "corpus", MODEL).manifest.hash
    node = trace(planted_project, planted_project.content("cpt", MODEL))
    assert node.inputs["corpus"].replaced and not node.inputs["reconstruction"].replaced
    assert node.inputs["corpus"].recorded == before["corpus"]
    printed = lineage(planted_project)
    assert f"{before['corpus']}  replaced since, now {after}" in printed


def test_a_source_that_was_edited_since_is_marked(planted_project: Project) -> None:
    runner.run_stage(planted_project, "corpus", MODEL)
    (planted_project.source_dir(MODEL) / "notes.txt").write_text("Another river.")
    sources = trace(planted_project, planted_project.stage_dir("corpus", MODEL)).sources
    assert [source.record.path for source in sources if source.changed] == [f"data/sources/{MODEL}/notes.txt"]


def test_a_broken_chain_says_where_and_how_to_mend_it(planted_project: Project) -> None:
    make_all(planted_project)
    (planted_project.stage_dir("cpt", MODEL) / FILE_NAME).unlink()
    with pytest.raises(ArtifactError, match=r"breaks at its input cpt .*refrag run cpt --model tiny"):
        trace(planted_project, planted_project.stage_dir("chunks", MODEL))
    with pytest.raises(ArtifactError, match=r"no manifest.json in .*cpt: it is not a finished artifact"):
        trace(planted_project, planted_project.stage_dir("cpt", MODEL))


def test_a_damaged_manifest_is_named(planted_project: Project) -> None:
    runner.run_stage(planted_project, "corpus", MODEL)
    (planted_project.stage_dir("corpus", MODEL) / FILE_NAME).write_text('{"stage": "corpus"}')
    with pytest.raises(ArtifactError, match="is damaged"):
        Manifest.read(planted_project.stage_dir("corpus", MODEL))


def test_status_tells_current_stale_damaged_and_missing_apart(
    planted_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_all(planted_project)
    assert {entry.state for entry in status(planted_project, MODEL)} == {"current"}
    (planted_project.content("reconstruction", MODEL) / "train.json").write_text("?")
    shutil.rmtree(planted_project.stage_dir("policy", MODEL))
    states = {entry.stage: entry.state for entry in status(planted_project, MODEL)}
    assert states["corpus"] == "current"
    assert states["reconstruction"] == "damaged"
    assert states["cpt"] == states["finetuned"] == states["chunks"] == states["evaluation"] == "stale"
    assert states["policy"] == "missing"
    monkeypatch.chdir(planted_project.root)
    result = refrag("status", "--model", MODEL)
    (line,) = [line for line in result.stdout.splitlines() if "reconstruction" in line]
    assert "damaged" in line and f"models/{MODEL}/reconstruction" in line
