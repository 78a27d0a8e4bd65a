"""The real stages on the tiny model: DVC alone, the runner alone, and another source."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.history import dvc
from refrag_platform.history.pipeline import RECIPE
from refrag_platform.lineage.impact import forget
from refrag_platform.lineage.lineage import find, trace
from refrag_platform.model.loading import load_bundle
from refrag_platform.project import Project
from refrag_platform.serving.bento import Package, store_path
from refrag_platform.stages import STAGES
from refrag_platform.store.table import ChunkStore
from tests.conftest import copy_project, init_repository
from tests.encoders import recipe_with
from tests.planted import MODEL, run
from tests.traced import run_traced

pytestmark = pytest.mark.slow
TARGETS = [dvc.target(stage, MODEL) for stage in (RECIPE, *STAGES)]
SOURCE = "The river rises in the north of the country and flows south. " * 20


def prepare(folder: Path, source: str = SOURCE) -> Project:
    project = init_repository(copy_project(folder))
    (project.source_dir(MODEL) / "river.txt").write_text(source)
    return project


def refrag(project: Project, *arguments: str) -> str:
    return run(project.root, "python", "-m", "refrag_platform", *arguments)


def hashes(project: Project) -> dict[str, str]:
    return {stage: Manifest.read(project.stage_dir(stage, MODEL)).hash for stage in STAGES}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, dict[str, list[str]]]:
    """Every stage of the tiny model, made by the runner; and by stage, the files of the package that ran for it."""
    project = prepare(tmp_path_factory.mktemp("made") / "project")
    return project, {stage: run_traced(project, stage) for stage in STAGES}


@pytest.fixture(scope="module")
def made(traced: tuple[Project, dict[str, list[str]]]) -> Project:
    """Every stage of the tiny model, made by the runner."""
    return traced[0]


@pytest.mark.parametrize("stage", STAGES)
def test_every_file_that_runs_for_a_stage_is_its_code(traced: tuple[Project, dict[str, list[str]]], stage: str) -> None:
    project, ran = traced
    function = STAGES[stage].function.split(":")[0].replace(".", "/")
    assert f"{function}.py" in ran[stage] and len(ran[stage]) > 5
    assert set(ran[stage]) <= set(STAGES[stage].code(project.root))


def test_dvc_repro_without_dagster_gives_the_same_hashes(made: Project, tmp_path: Path) -> None:
    reproduced = prepare(tmp_path / "project")
    run(reproduced.root, "dvc", "repro", *TARGETS)
    assert hashes(reproduced) == hashes(made)
    for stage in STAGES:
        assert dvc.recorded_hash(reproduced, stage, MODEL) == dvc.record(made, stage, MODEL)
    for project in (reproduced, made):
        assert "up to date" in run(project.root, "dvc", "status", *TARGETS)
        assert run(project.root, "git", "status", "--porcelain").split() == ["??", "dvc.lock"]


def test_an_encoder_of_the_decoder_s_layers_that_reads_passages_goes_through_every_stage(tmp_path: Path) -> None:
    project = prepare(tmp_path / "project")
    values = recipe_with("layers, passage").model_dump(mode="json")
    project.recipe_path(MODEL).write_text(yaml.safe_dump(values))
    refrag(project, "run", "all", "--model", MODEL)
    assert set(hashes(project)) == set(STAGES)
    bundle = load_bundle(MODEL, project)
    store = ChunkStore.open(project.content("chunks", MODEL), expect_encoder=bundle.model.encoder_digest())
    (hit,) = store.search("Where does the river rise?", 1)
    own = bundle.model.encode(torch.from_numpy(hit.token_ids).long()).detach()
    torch.testing.assert_close(torch.from_numpy(hit.vectors).float(), own, atol=0.02, rtol=0.01)
    refrag(project, "ask", "Where does the river rise?", "--model", MODEL)


def test_one_changed_byte_of_a_source_changes_every_hash_down_the_chain(made: Project, tmp_path: Path) -> None:
    changed = prepare(tmp_path / "project", SOURCE.replace("north", "North", 1))
    refrag(changed, "run", "all", "--model", MODEL)
    before, after = hashes(made), hashes(changed)
    assert [stage for stage in STAGES if before[stage] == after[stage]] == []


def test_the_chain_of_the_bento_goes_down_to_every_source(made: Project) -> None:
    node = trace(made, made.stage_dir("package", MODEL))
    assert {found.manifest.stage for found in node.walk()} == set(STAGES)
    corpus = next(found for found in node.walk() if found.manifest.stage == "corpus")
    sources = [source.record.path for source in corpus.sources]
    assert f"data/sources/{MODEL}/river.txt" in sources
    assert not [source for source in sources if Path(source).is_absolute()], "no path of this machine"


def test_a_document_leads_to_the_bento_and_the_bento_to_the_document(made: Project) -> None:
    tag = Package.of(made, MODEL).bento_tag
    source = f"data/sources/{MODEL}/river.txt"
    for document in (source, "files/river.txt"):
        found = find(made, document)
        assert tag in {version.name for version in found.graph.after(found.versions).versions}
    found = find(made, str(store_path(made, "bentos", tag)))
    assert source in {version.name for version in found.graph.behind(found.versions).versions}


def test_forgetting_a_document_names_every_artifact_that_saw_it(made: Project) -> None:
    by_id, by_path = forget(made, "files/river.txt"), forget(made, f"data/sources/{MODEL}/river.txt")
    assert by_id == by_path and not by_id.unclear
    assert {version.hash for version in by_id.rebuild[MODEL]} == set(hashes(made).values())
    of_the_package = forget(made, first_country(made))
    assert of_the_package.rebuild == by_id.rebuild and "corpus.sources" in of_the_package.remove


def first_country(project: Project) -> str:
    ids = pq.read_table(project.content("corpus", MODEL) / "documents.parquet", columns=["id"])["id"].to_pylist()
    return next(str(id) for id in ids if id.startswith("factbook"))
