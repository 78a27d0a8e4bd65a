"""The encoder in fine-tuning: the chunk store and the policy are of the encoder that came out of it."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.errors import ArtifactError
from refrag_platform.history.freshness import is_current
from refrag_platform.model.loading import load_bundle
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.runner import run_stage
from refrag_platform.store.content import StoreDescription
from tests.command import refrag, refused
from tests.training.test_start import MODEL, start_from_release, write_release

SMALL = {
    "corpus": {"sources": [{"kind": "factbook", "documents": 12}]},
    "finetuned": {"steps": 2},
    "policy": {"steps": 2},
}


def override(project: Project, **sections: dict[str, object]) -> None:
    params = project.params()
    for section, values in sections.items():
        params["overrides"][MODEL].setdefault(section, {}).update(values)
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture
def started(project: Project) -> Project:
    """tiny up to cpt, taken over from a release, and hardly any training after it."""
    write_release(project, seed=1)
    start_from_release(project, ("reconstruction", "cpt"))
    override(project, **SMALL)
    for stage in ("corpus", "reconstruction", "cpt"):
        run_stage(project, stage, MODEL)
    return project


def encoder(project: Project, stage: str) -> str:
    return RefragModel.load(project.content(stage, MODEL)).encoder_digest()


def make_readers(project: Project) -> None:
    for stage in ("finetuned", "chunks", "policy"):
        run_stage(project, stage, MODEL)


def readers_encoders(project: Project) -> set[str | None]:
    store = StoreDescription.read(project.content("chunks", MODEL))
    return {store.encoder_digest, PolicyNetwork.load(project.content("policy", MODEL)).encoder_digest}


def test_store_and_policy_are_of_the_encoder_that_fine_tuning_leaves(started: Project) -> None:
    make_readers(started)
    assert readers_encoders(started) == {encoder(started, "cpt")} == {encoder(started, "finetuned")}, "frozen"
    override(started, finetuned={"encoder_learning_rate": 1e-2})
    run_stage(started, "finetuned", MODEL)
    assert not any(is_current(started, stage, MODEL) for stage in ("chunks", "policy"))
    assert encoder(started, "finetuned") != encoder(started, "cpt")
    with pytest.raises(ArtifactError, match=r"policy in .* was trained on vectors of the encoder .* train it again"):
        load_bundle(MODEL, started)
    assert load_bundle(MODEL, started, choosing=False).policy is None
    make_readers(started)
    assert readers_encoders(started) == {encoder(started, "finetuned")}


def test_the_policy_is_rewarded_by_the_fine_tuned_decoder(started: Project) -> None:
    override(started, finetuned={"decoder_learning_rate": 1e-4})
    make_readers(started)
    first = Manifest.read(started.stage_dir("policy", MODEL)).metrics["reward"]
    override(started, finetuned={"decoder_learning_rate": 1e-2})
    make_readers(started)
    assert Manifest.read(started.stage_dir("policy", MODEL)).metrics["reward"] != first


def test_systems_that_choose_nothing_are_judged_before_there_is_a_policy(
    started: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage(started, "finetuned", MODEL)
    monkeypatch.chdir(started.root)
    asked, out = started.content("corpus", MODEL) / "questions" / "test.jsonl", tmp_path / "rag.json"
    command = ["evaluate", "rag", "--model", MODEL, "--questions", str(asked), "--passages", "2", "--limit", "2"]
    command += ["--json", str(out), "--share-kept", "0"]
    for chosen in (["full,rule", "--shares", "0.2"], ["full,refrag"]):
        refrag(*command, "--systems", *chosen)
        assert {row["system"] for row in json.loads(out.read_text())["rows"]} == set(chosen[0].split(","))
    assert "has no policy yet" in refused(*command, "--systems", "full,refrag", "--shares", "0.2")


def test_the_policy_comes_from_its_artifact_and_its_absence_is_named(started: Project) -> None:
    run_stage(started, "finetuned", MODEL)
    with pytest.raises(ArtifactError, match=r"tiny has no policy yet .*refrag run policy --model tiny"):
        load_bundle(MODEL, started)
    run_stage(started, "policy", MODEL)
    folder, artifact = started.content("finetuned", MODEL), started.content("policy", MODEL)
    assert not (folder / "policy.json").exists()
    wanted = PolicyNetwork.load(artifact).state_dict()
    for name, own in ((MODEL, None), (str(folder), None), (str(folder.parent), None), (str(folder), artifact)):
        found = load_bundle(name, started, policy=own).policy
        assert found is not None
        torch.testing.assert_close(dict(found.state_dict()), dict(wanted))
