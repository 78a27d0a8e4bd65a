"""Artifacts of the pipeline's former order, in which policy and chunks came before fine-tuning: stale, and named so."""

from dataclasses import replace

import pytest

from refrag_platform import runner
from refrag_platform.errors import ArtifactError
from refrag_platform.history.status import status
from refrag_platform.lineage.lineage import trace
from refrag_platform.project import Project
from refrag_platform.releases.promotion import promote
from refrag_platform.stages import STAGES
from tests.planted import MODEL, make_all, plant

FORMER = {
    "chunks": ("corpus", "cpt"),
    "policy": ("corpus", "cpt"),
    "finetuned": ("corpus", "cpt", "policy"),
    "evaluation": ("corpus", "chunks", "finetuned"),
    "package": ("chunks", "finetuned", "evaluation"),
}


@pytest.fixture
def former(repository: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose artifacts were made in the former order."""
    plant(monkeypatch)
    with pytest.MonkeyPatch.context() as before:
        for name, inputs in FORMER.items():
            before.setitem(STAGES, name, replace(STAGES[name], inputs=inputs))
        for name in ("corpus", "reconstruction", "cpt", *FORMER):
            runner.run_stage(repository, name, MODEL)
    return repository


def test_they_are_stale_and_the_next_run_makes_them_again(former: Project) -> None:
    assert {entry.stage for entry in status(former, MODEL) if entry.state == "stale"} == set(FORMER)
    assert {node.manifest.stage for node in trace(former, former.stage_dir("finetuned", MODEL)).walk()} >= {"policy"}
    make_all(former)
    assert {entry.state for entry in status(former, MODEL)} == {"current"}


def test_they_are_not_released(former: Project) -> None:
    said = r"fine-tuned model of tiny was made from corpus, cpt, policy, in a former order .*refrag run finetuned"
    with pytest.raises(ArtifactError, match=said):
        promote(former, MODEL)


def test_a_chain_of_both_orders_is_named_and_not_followed_for_ever(former: Project) -> None:
    runner.run_stage(former, "policy", MODEL)
    with pytest.raises(ArtifactError, match=r"finetuned was made from it, in a former order .*refrag run finetuned"):
        trace(former, former.stage_dir("finetuned", MODEL))
