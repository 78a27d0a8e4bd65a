"""Packed weights are a part of the lineage: the stages that their manifest.json records lead down to source files."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from refrag_platform.artifacts.digest import file_digest
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.compact.coding import Coding
from refrag_platform.compact.packing import Codings, pack
from refrag_platform.errors import RefragError
from refrag_platform.lineage.graph import Graph, Version
from refrag_platform.lineage.impact import forget
from refrag_platform.project import Project
from refrag_platform.runner import run_stage
from tests.command import refrag, refused
from tests.conftest import copy_project
from tests.planted import override
from tests.training.test_start import FIGURES, MODEL, start_from_release

SOURCE, OTHER = (f"data/sources/{MODEL}/{name}.txt" for name in ("notes", "other"))
RELEASE, CORPUS = f"models/{MODEL}/release", f"data/{MODEL}/corpus"
WITHOUT = "replace it by weights that never saw it"
STAGES = ("corpus", "reconstruction", "cpt")
TRAINED = [f"models/{MODEL}/{stage}" for stage in STAGES[1:]]


def make(project: Project) -> list[Manifest]:
    return [run_stage(project, stage, MODEL).manifest for stage in STAGES]


def train_from_scratch(project: Project) -> list[Manifest]:
    params = project.params()
    short = {"steps": 2, "curriculum": {"max_factor": 2, "stages": 1}}
    params["overrides"][MODEL] |= {"reconstruction": short, "cpt": short}
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))
    return make(project)


def write_release(project: Project, stages: list[Manifest], bits: int = 8) -> None:
    """Pack CPT's model, with a record of these stages."""
    recipe, base = project.recipe(MODEL), project.recipe_path(MODEL).parent
    codings = Codings(Coding(bits), Coding(bits), Coding(0))
    figures = dict.fromkeys(STAGES[1:], FIGURES)
    model = project.content("cpt", MODEL)
    pack(model, recipe, base, project.root / RELEASE, codings, stages=stages, training=figures, replace=True)


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Manifest]]:
    project = copy_project(tmp_path_factory.mktemp("packed") / "project")
    (project.root / SOURCE).write_text("The river rises in the north and flows south. " * 20)
    stages = train_from_scratch(project)
    write_release(project, stages)
    (project.root / SOURCE).unlink()
    (project.root / OTHER).write_text("The hills are low. " * 20)
    start_from_release(project, STAGES[1:])
    make(project)
    return project.root, stages


@pytest.fixture
def packed(
    packed_once: tuple[Path, list[Manifest]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Project, list[Manifest]]:
    """A project and the stages of the model that it packed; since then its document has gone and another has come."""
    root, stages = packed_once
    shutil.copytree(root, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    return Project(tmp_path / "project"), stages


def test_what_started_from_a_release_saw_what_the_release_was_made_from(packed: tuple[Project, list[Manifest]]) -> None:
    project, _ = packed
    found = json.loads(refrag("forget", SOURCE, "--json").stdout)
    assert [entry["path"] for entry in found["rebuild"][MODEL]] == TRAINED
    assert [(entry["name"], entry["places"]) for entry in found["elsewhere"]] == [(RELEASE, ["in place"])]
    assert found["releases"] == [RELEASE] and not found["unclear"]
    steps = refrag("forget", SOURCE).stdout.split("To forget it:\n")[1].splitlines()
    assert steps[0] == f"  1. remove {SOURCE} (it is gone already)"
    assert steps[1].startswith(f"  2. {RELEASE}: replace it") and "take `continue_from: release` out" in steps[1]
    assert steps[2:] == [f"  3. refrag run all --model {MODEL}"]
    of_the_other = forget(project, OTHER)
    assert not of_the_other.elsewhere and not of_the_other.releases and len(of_the_other.rebuild[MODEL]) == len(STAGES)
    train_from_scratch(project)
    assert not forget(project, SOURCE).rebuild


def test_lineage_goes_through_a_release_both_ways(packed: tuple[Project, list[Manifest]]) -> None:
    project, (corpus, *trained) = packed
    chain = refrag("lineage", TRAINED[-1]).stdout
    down = refrag("lineage", SOURCE).stdout
    up = refrag("lineage", RELEASE).stdout
    for manifest, path in zip(trained, TRAINED, strict=True):
        assert all(f"{path} {manifest.hash}" in " ".join(text.split()) for text in (chain, down, up))
    record = Manifest.read(project.root / CORPUS).hash, corpus.hash
    assert record[0] in chain and record[1] in chain and record[0] not in up and record[1] in up
    release = file_digest(project.root / RELEASE / "manifest.json")
    assert release in chain and release in down and SOURCE in chain and SOURCE in up
    nodes = json.loads(refrag("lineage", RELEASE, "--down", "--json").stdout)["nodes"]
    assert [node["name"] for node in nodes] == [RELEASE, *TRAINED]


def test_a_release_that_went_on_from_another_leads_to_what_that_was_made_from(
    packed: tuple[Project, list[Manifest]],
) -> None:
    project, _ = packed
    manifest = project.root / RELEASE / "manifest.json"
    first, before = file_digest(manifest), json.loads(manifest.read_bytes())
    override(project, "finetuned", {"encoder_learning_rate": 0.0, "projection_learning_rate": 0.0})
    for stage in ("finetuned", "policy"):
        run_stage(project, stage, MODEL)
    command = ("weights", "pack", "--model", MODEL, "--replace", "--encoder-bits", 4, "--decoder-bits", 4)
    # Packed again over themselves, they went on from the same ones.
    for _ in range(2):
        refrag(*command)
        after = json.loads(manifest.read_bytes())
        assert after["continues"]["hash"] == first and after["continues"]["stages"] == before["stages"]
        # Fine-tuning left the encoder as it was: it is not rounded once more, to fewer bits.
        kept, trained = "encoder.safetensors", "decoder.safetensors"
        assert after["files"][kept] == before["files"][kept] and after["files"][trained] != before["files"][trained]
        assert [after["codings"][part]["bits"] for part in ("encoder", "decoder")] == [8, 4]
    up = refrag("lineage", RELEASE).stdout
    assert first in up and SOURCE in up and OTHER in up
    for source in (SOURCE, OTHER):
        found = forget(project, source)
        assert found.releases == [RELEASE] and RELEASE not in {version.name for version, _ in found.unclear}
    card = (project.root / RELEASE / "README.md").read_text()
    assert "| finetuned |" in card and f"before that, in the packed weights {first[:8]}: corpus: " in card
    write_release(project, [])
    assert f"went on from {RELEASE}/manifest.json of hash {first}" in refused(*command)


def test_a_document_is_looked_up_in_the_recorded_corpus_once_its_source_is_here(
    packed: tuple[Project, list[Manifest]],
) -> None:
    project, (corpus, *_) = packed
    with pytest.raises(RefragError) as error:
        forget(project, "files/notes.txt")
    (source,) = (source for source in corpus.sources if source.path == SOURCE)
    assert f"documents of {CORPUS} {corpus.hash} can't be looked up" in str(error.value)
    assert f"{SOURCE} {source.hash}" in str(error.value) and f"refrag run corpus --model {MODEL}" in str(error.value)
    (project.root / OTHER).unlink()
    (project.root / SOURCE).write_text("The river rises in the north and flows south. " * 20)
    assert run_stage(project, "corpus", MODEL).manifest.hash == corpus.hash
    assert forget(project, "files/notes.txt").releases == [RELEASE]


def test_a_document_of_a_package_may_be_in_a_release_that_was_made_of_it(
    packed: tuple[Project, list[Manifest]],
) -> None:
    project, _ = packed
    ids = pq.read_table(project.content("corpus", MODEL) / "documents.parquet", columns=["id"])["id"].to_pylist()
    assert forget(project, next(id for id in ids if id.startswith("factbook"))).releases == [RELEASE]


def test_a_release_without_a_record_is_unclear_and_so_is_what_started_from_it(
    packed: tuple[Project, list[Manifest]],
) -> None:
    project, stages = packed
    replaced = file_digest(project.root / RELEASE / "manifest.json")
    write_release(project, [])
    release = f"{RELEASE} {file_digest(project.root / RELEASE / 'manifest.json')}"
    found = forget(project, OTHER)
    # What is in place is still of the release before, of which no record is left.
    expected = {*((path, f"{RELEASE} {replaced}") for path in TRAINED), (RELEASE, release)}
    assert {(version.name, str(missing)) for version, missing in found.unclear} == expected
    make(project)
    found = forget(project, OTHER)
    assert {(version.name, str(missing)) for version, missing in found.unclear} == {
        (path, release) for path in (*TRAINED, RELEASE)
    }
    assert set(TRAINED) < {version.name for version in found.rebuild[MODEL]} and found.releases == [RELEASE]
    assert f"no record says what {release} was made from" in refrag("forget", OTHER).stdout
    with pytest.raises(RefragError, match=f"No record says what {release} was made from"):
        forget(project, "files/notes.txt")
    # A record that names a corpus of which there is none leaves that unclear too.
    write_release(project, stages[1:])
    assert (RELEASE, CORPUS) in {(version.name, missing.name) for version, missing in forget(project, OTHER).unclear}


def test_what_cannot_be_read_is_named_where_it_is_asked_for_and_stops_nothing_else(
    packed: tuple[Project, list[Manifest]],
) -> None:
    project, _ = packed
    (project.root / TRAINED[-1] / "manifest.json").write_text("{")
    (project.root / RELEASE / "manifest.json").unlink()
    (project.root / RELEASE / "manifest.json").mkdir()
    assert f"{TRAINED[-1]}/manifest.json is damaged" in refused("lineage", TRAINED[-1], "--down")
    assert TRAINED[0] in refrag("lineage", OTHER).stdout


def test_other_models_releases_are_no_matter(packed: tuple[Project, list[Manifest]]) -> None:
    project, _ = packed
    write_release(project, [])
    assert forget(project, OTHER, MODEL).releases == [RELEASE]
    assert not forget(project, OTHER, "other").releases
    step = next(line for line in refrag("forget", OTHER).stdout.splitlines() if WITHOUT in line)
    assert step.lstrip(" 1234567890.").startswith(f"if it may be in {RELEASE}")


def test_weights_that_were_packed_again_unchanged_may_stand_behind_themselves(tmp_path: Path) -> None:
    graph = Graph()
    release, policy = Version("release", RELEASE, "a"), Version("artifact", "models/tiny/policy", "b")
    graph.add(release, [policy])
    graph.add(policy, [release])
    assert {version for layer in graph.layers() for version in layer} == {release, policy}
