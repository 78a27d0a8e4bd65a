"""A model trained on from its release: the encoder stays, and so do the vectors of what did not change."""

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file

from refrag_platform import runner
from refrag_platform.artifacts.digest import file_digest, folder_digest
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.errors import RefragError
from refrag_platform.history import tags
from refrag_platform.history.git import Git
from refrag_platform.history.runs import commit_run
from refrag_platform.lineage.graph import Version, read_graph
from refrag_platform.project import Project
from refrag_platform.releases.continuation import set_start
from refrag_platform.store.content import StoreDescription
from tests.planted import MODEL, make_all, run

UP_TO_CHUNKS = ("corpus", "reconstruction", "cpt", "finetuned", "chunks")
SMALL = {
    "corpus": {"sources": [{"kind": "factbook", "documents": 12}, {"kind": "files"}]},
    "reconstruction": {"steps": 2, "curriculum": {"max_factor": 2, "stages": 1}},
    "cpt": {"steps": 2, "curriculum": {"max_factor": 2, "stages": 1}},
    "finetuned": {"steps": 2},
}


def make(project: Project, *names: str) -> dict[str, bool]:
    """Run stages; whether each was cached."""
    return {name: runner.run_stage(project, name, MODEL).cached for name in names}


def release(project: Project) -> str:
    """Tag what is in place as a release, whatever the gate would say."""
    git, commit = Git(project.root), commit_run(project, MODEL)
    version = tags.register(git, MODEL, commit, "tiny: by hand")
    tags.assign(git, MODEL, commit, "tiny: by hand")
    return version.name


def continue_from(project: Project) -> tuple[str | None, str | None]:
    recipe = project.recipe(MODEL)
    return recipe.reconstruction.continue_from, recipe.cpt.continue_from


@pytest.fixture
def small(repository: Project) -> Project:
    """tiny with hardly any training."""
    params = repository.params()
    params["overrides"][MODEL] |= SMALL
    (repository.root / "params.yaml").write_text(yaml.safe_dump(params))
    return repository


@pytest.mark.slow
def test_new_documents_leave_the_encoder_and_the_vectors_of_the_old_ones(
    small: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "no version of tiny is released yet" in set_start(small, MODEL, "continue")
    make(small, *UP_TO_CHUNKS)
    version = release(small)
    assert "nothing to continue with" in set_start(small, MODEL, "continue")
    assert continue_from(small) == (None, None)
    chunks, cpt = small.content("chunks", MODEL), small.content("cpt", MODEL)
    old = StoreDescription.read(chunks)
    old_vectors, old_rows = load_file(chunks / "chunks-00000.safetensors"), pq.read_table(chunks / "passages.parquet")
    encoder, decoder = file_digest(cpt / "encoder.safetensors"), folder_digest(cpt / "decoder")

    (small.source_dir(MODEL) / "new.txt").write_text("The river Ub rises in the northern hills. " * 40)
    assert make(small, "corpus") == {"corpus": False}
    assert f"from {MODEL}@{version}" in set_start(small, MODEL, "continue")
    assert continue_from(small) == (version, version)
    capfd.readouterr()
    assert not any(make(small, *UP_TO_CHUNKS[1:]).values())
    said = capfd.readouterr().err
    assert "keep their vectors" in said
    store = StoreDescription.read(chunks)
    assert store.encoder_digest == old.encoder_digest and store.passages > old.passages
    assert f"{store.passages - old.passages:,} encoded" in said
    assert folder_digest(cpt / "decoder") != decoder, "the decoder did learn"
    sources = [record.path for record in Manifest.read(small.stage_dir("cpt", MODEL)).sources]
    assert sources == [f"{MODEL}@{version}:cpt"]
    vectors, rows = load_file(chunks / "chunks-00000.safetensors"), pq.read_table(chunks / "passages.parquet")
    new_places = {row["id"]: row for row in rows.to_pylist()}
    for row in old_rows.to_pylist():
        place = new_places[row["id"]]
        here = slice(place["chunk_start"], place["chunk_start"] + place["chunk_count"])
        there = slice(row["chunk_start"], row["chunk_start"] + row["chunk_count"])
        assert (vectors["vectors"][here] == old_vectors["vectors"][there]).all()
        assert place["retrieval_vector"] == row["retrieval_vector"]
    assert all(make(small, *UP_TO_CHUNKS).values()), "all is as it should be"

    assert "from scratch" in set_start(small, MODEL, "full")
    assert continue_from(small) == (None, None)
    assert not any(make(small, *UP_TO_CHUNKS[1:]).values())
    assert "the whole chunk store of tiny is encoded again: its encoder digest is" in capfd.readouterr().err
    assert file_digest(cpt / "encoder.safetensors") != encoder


def test_what_can_not_be_continued_is_trained_in_full_and_the_run_says_why(recorded: Project) -> None:
    version = release(recorded)
    old, corpus = (Manifest.read(recorded.stage_dir(stage, MODEL)).hash for stage in ("cpt", "corpus"))
    (recorded.source_dir(MODEL) / "more.txt").write_text("The sea is deep.")
    make(recorded, "corpus")
    assert "continue: training goes on" in set_start(recorded, MODEL, "continue")
    make(recorded, "reconstruction", "cpt")
    graph = read_graph(recorded)
    behind = graph.behind(
        [Version("artifact", f"models/{MODEL}/cpt", Manifest.read(recorded.stage_dir("cpt", MODEL)).hash)]
    )
    assert Version("artifact", f"models/{MODEL}/cpt", old) in behind.versions
    assert {version.hash for version in behind.versions if version.name == f"data/{MODEL}/corpus"} > {corpus}
    params = recorded.params()
    params["overrides"][MODEL]["projection"] = {"activation": "relu"}
    (recorded.root / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(
        RefragError, match=rf"is '{version}', but the recipe's projection changed since .*; train in full"
    ):
        make(recorded, "reconstruction")
    said = set_start(recorded, MODEL, "continue")
    assert f"projection changed since {MODEL}@{version} was made, so this run is a full one" in said
    assert continue_from(recorded) == (None, None)


@pytest.mark.parametrize("cpt", ["release", None], ids=["both taken over", "cpt trains on"])
def test_a_full_run_starts_from_the_weights_that_come_with_the_repository_where_params_say_so(
    small: Project, cpt: str | None
) -> None:
    params = small.params()
    params["overrides"][MODEL]["reconstruction"]["continue_from"] = "release"
    params["overrides"][MODEL]["cpt"]["continue_from"] = cpt
    (small.root / "params.yaml").write_text(yaml.safe_dump(params))
    assert f"training starts from models/{MODEL}/release" in set_start(small, MODEL, "full")
    assert continue_from(small) == ("release", cpt)
    said = set_start(small, MODEL, "continue")
    assert "no version of tiny is released yet, so this run is a full one: training starts from models/tiny" in said
    assert continue_from(small) == ("release", cpt)


@pytest.mark.slow
def test_a_run_leaves_params_yaml_to_the_user_and_dvc_sees_where_it_starts(recorded: Project) -> None:
    params, file = (recorded.root / "params.yaml").read_bytes(), recorded.run_overrides(MODEL)
    version = release(recorded)
    (recorded.source_dir(MODEL) / "more.txt").write_text("The sea is deep.")
    make(recorded, "corpus")
    set_start(recorded, MODEL, "continue")
    assert (recorded.root / "params.yaml").read_bytes() == params
    assert yaml.safe_load(file.read_text()) == {
        stage: {"continue_from": version} for stage in ("reconstruction", "cpt")
    }
    assert "reconstruction@tiny" in run(recorded.root, "dvc", "status")
    assert run(recorded.root, "git", "status", "--porcelain").split() == ["??", "dvc.lock"]
    make_all(recorded)
    commit = commit_run(recorded, MODEL)
    kept = run(recorded.root, "git", "show", f"{commit}:models/{MODEL}/run/overrides.yaml")
    assert kept == file.read_text(), "a clone of the run trains from the same"
    set_start(recorded, MODEL, "full")
    assert not file.exists()


def test_a_policy_of_the_release_is_trained_once_its_encoder_is_another(recorded: Project) -> None:
    release(recorded)
    (recorded.source_dir(MODEL) / "more.txt").write_text("The sea is deep.")
    params = recorded.params()
    for stage in ("reconstruction", "cpt", "policy"):
        params["overrides"][MODEL][stage] = {"continue_from": "release"}
    (recorded.root / "params.yaml").write_text(yaml.safe_dump(params))
    make(recorded, "corpus")
    assert "full: training starts from models/tiny/release" in set_start(recorded, MODEL, "full")
    assert recorded.recipe(MODEL).policy.continue_from == "release"
    said = set_start(recorded, MODEL, "continue")
    assert "continue: training goes on" in said and "only passages that changed are encoded again" in said
    assert recorded.recipe(MODEL).policy.continue_from is None


def test_a_run_that_continues_says_that_fine_tuning_will_change_all_vectors(recorded: Project) -> None:
    release(recorded)
    (recorded.source_dir(MODEL) / "more.txt").write_text("The sea is deep.")
    params = recorded.params()
    params["overrides"][MODEL]["finetuned"] = {"encoder_learning_rate": 0.1}
    (recorded.root / "params.yaml").write_text(yaml.safe_dump(params))
    make(recorded, "corpus")
    assert "fine-tuning trains it, so the whole chunk store is encoded again" in set_start(recorded, MODEL, "continue")


def test_both_trainings_continue_from_one_version_that_is_there(recorded: Project) -> None:
    params = recorded.params()
    for stage in ("reconstruction", "cpt"):
        params["overrides"][MODEL][stage] = {"continue_from": "v9.0.0"}
    (recorded.root / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(RefragError, match=r"'v9.0.0', which is no version of it; there are: none"):
        make(recorded, "reconstruction")
    params["overrides"][MODEL]["cpt"] = {}
    (recorded.root / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(RefragError, match=r"both must name the same version"):
        recorded.recipe(MODEL)
