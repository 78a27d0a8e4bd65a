"""Promotion, refusal and rollback over real Git tags and a real DVC repository; the artifacts are planted."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from refrag_platform import runner, stages
from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import published
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.evaluation.items import Items
from refrag_platform.history import dvc
from refrag_platform.history.versions import released, releases
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe
from refrag_platform.releases import again, promotion
from refrag_platform.releases.promotion import promote, rollback
from refrag_platform.releases.restore import SERVED, restore
from tests.candidates import held_out, make_candidate
from tests.command import refrag
from tests.conftest import set_remote
from tests.planted import MODEL, override, plant, run

Make = Callable[..., dict[str, str]]


@pytest.fixture(scope="session")
def first_once(recorded_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A repository with a first release, v1.0.0, of quality 0.5."""
    return released_over(recorded_once, tmp_path_factory.mktemp("first"), 50, 0.5)


@pytest.fixture(scope="session")
def second_once(first_once: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same with a better release over it, v1.1.0, of quality 0.6; both are in the remote."""
    project = released_over(first_once.root, tmp_path_factory.mktemp("second"), 60, 0.6)
    run(project.root, "dvc", "push", "--all-tags")
    return project


@pytest.fixture
def first(first_once: Project, tmp_path: Path) -> Project:
    """A copy of its own of that repository."""
    return copy(first_once.root, tmp_path / "copy")


@pytest.fixture
def second(second_once: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of its own of that repository."""
    plant(monkeypatch)
    return copy(second_once.root, tmp_path / "copy")


def copy(root: Path, target: Path) -> Project:
    """A copy of a repository and of DVC's remote beside it."""
    shutil.copytree(root.parent, target, symlinks=True)
    project = Project(target / "project")
    set_remote(project, target / "remote")
    return project


def released_over(root: Path, folder: Path, steps: int, quality: float) -> Project:
    """A copy of a repository in which a planted model was made and released."""
    project = copy(root, folder / "copy")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_candidate(project, monkeypatch, steps, held_out(quality))
        outcome = promote(project, MODEL)
    assert outcome.new and outcome.decision is not None and outcome.decision.promoted
    return project


@pytest.fixture
def candidate(first: Project, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Plants another model in place of the released one."""
    return lambda steps, items: make_candidate(first, monkeypatch, steps, items)


def git(project: Project, *arguments: str) -> str:
    return run(project.root, "git", *arguments).strip()


def all_tags(project: Project) -> str:
    return git(project, "for-each-ref", "refs/tags", "refs/heads")


def release_command(project: Project, monkeypatch: pytest.MonkeyPatch, *arguments: str, status: int = 0) -> str:
    monkeypatch.chdir(project.root)
    return refrag("release", *arguments, status=status).output


def test_the_first_release_is_tagged_on_the_commit_that_holds_its_manifests(first: Project) -> None:
    release = released(first, MODEL)
    assert release is not None
    assert (release.version, release.record["over"]) == ("v1.0.0", None)
    assert "first release" in release.record["decision"]["reason"]
    assert git(first, "tag", "--list").split() == [f"{MODEL}#prod#1", f"{MODEL}@v1.0.0"]
    assert git(first, "rev-parse", f"runs/{MODEL}") == release.commit
    assert release.hashes == {stage: dvc.recorded_hash(first, stage, MODEL) for stage in stages.STAGES}
    assert release.metrics["P32_refrag"] == 3.5
    again = promote(first, MODEL)
    assert (again.new, again.release) == (False, release)
    assert git(first, "tag", "--list").split() == [f"{MODEL}#prod#1", f"{MODEL}@v1.0.0"]


def test_a_better_candidate_is_released(second: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    new = released(second, MODEL)
    assert new is not None
    assert (new.version, new.record["over"]) == ("v1.1.0", "v1.0.0")
    assert new.hashes == {stage: dvc.recorded_hash(second, stage, MODEL) for stage in stages.STAGES}
    assert all(verdict["outcome"] == "better" for verdict in new.record["decision"]["verdicts"])
    assert f"{MODEL}@v1.1.0 is released" in release_command(second, monkeypatch, "promote", MODEL), "nothing to do"


def test_gto_and_dvc_read_the_tags(second: Project, tmp_path: Path) -> None:
    def reference(name: str) -> str:
        return run(second.root, "gto", "show", name, "--ref").strip()

    assert reference(f"{MODEL}@latest") == f"{MODEL}@v1.1.0"
    assert reference(f"{MODEL}#prod") == f"{MODEL}@v1.1.0"
    run(second.root, "dvc", "artifacts", "get", ".", MODEL, "--rev", "v1.0.0", "--out", str(tmp_path / "got"))
    assert folder_digest(tmp_path / "got") == releases(second, MODEL)[0].hashes["finetuned"]


def test_one_step_back_is_one_command(second: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = releases(second, MODEL)
    tags = git(second, "tag", "--list").split()
    assert "v1.0.0 is released again" in release_command(second, monkeypatch, "rollback", MODEL, "--reason", "slow")
    assert released(second, MODEL) == old
    assert git(second, "tag", "--list").split() == sorted([*tags, f"{MODEL}#prod#3"])
    assert "slow" in git(second, "tag", "--list", "--format=%(contents)", f"{MODEL}#prod#3")
    with pytest.raises(RefragError, match=r"v1.0.0 is its first release"):
        rollback(second, MODEL)
    lines = release_command(second, monkeypatch, "ls").splitlines()[1:]
    assert [(line[0], line.split("@")[1].split()[0]) for line in lines] == [("*", "v1.0.0"), (" ", "v1.1.0")]
    assert new.hashes["finetuned"] in lines[1] and "P32_refrag 3.4" in lines[1]
    assert "promoted: P32 better" in release_command(second, monkeypatch, "promote", MODEL)
    assert released(second, MODEL) == new, "the commit is a version already"


@pytest.mark.parametrize(
    ("items", "why"),
    [
        (held_out(0.2), "P32 worse (gain -0.3000"),
        (held_out(0.6, metrics=("P32", "f1")), "exact_match is missing from the candidate's evaluation"),
        (held_out(0.6, held_out_set="other"), "P32 was measured on another held-out set"),
    ],
)
def test_a_refused_candidate_leaves_everything_as_it_was(
    first: Project, candidate: Make, monkeypatch: pytest.MonkeyPatch, items: Items, why: str
) -> None:
    old, before = released(first, MODEL), all_tags(first)
    candidate(40, items)
    status = git(first, "status", "--porcelain")
    output = release_command(first, monkeypatch, "promote", MODEL, status=1)
    assert why in output and f"{MODEL}@v1.0.0 stays the released one" in output
    assert ("--again evaluates" in output) == ("another held-out set" in why)
    assert all_tags(first) == before
    assert released(first, MODEL) == old
    assert git(first, "status", "--porcelain") == status


def test_the_released_version_can_be_evaluated_again_on_the_candidates_set(
    first: Project, candidate: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = released(first, MODEL)
    candidate(40, held_out(0.2, held_out_set="other"))
    read: dict[str, str] = {}

    def measured(released: dict[str, Path], candidate: Path, corpus: Path, recipe: Recipe, base: Path) -> Items:
        read.update({stage: folder_digest(folder) for stage, folder in released.items()})
        assert candidate == first.content("finetuned", MODEL) and corpus == first.content("corpus", MODEL)
        assert base == first.recipe_path(MODEL).parent
        return held_out(0.5, held_out_set="other")

    monkeypatch.setattr(again, "measure", measured)
    assert "refused: P32 worse" in release_command(first, monkeypatch, "promote", MODEL, "--again", status=1)
    assert old is not None and read == {stage: old.hashes[stage] for stage in ("finetuned", "chunks", "policy")}


def test_a_refused_candidate_can_be_forced_with_a_reason_that_is_kept(
    first: Project, candidate: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate(40, held_out(0.2))
    output = release_command(
        first, monkeypatch, "promote", MODEL, "--force-reason", "a leak\nin v1", "--json", "--bump", "patch"
    )
    assert json.loads(output)["release"]["version"] == "v1.0.1"
    shown = json.loads(release_command(first, monkeypatch, "show", MODEL, "--json"))
    assert shown["record"]["force_reason"] == "a leak\nin v1"
    assert not shown["record"]["decision"]["promoted"]
    text = release_command(first, monkeypatch, "show", MODEL)
    assert "forced: a leak" in text and "refused: P32 worse" in text


def test_a_chain_that_does_not_hold_together_is_not_released(first: Project, candidate: Make) -> None:
    candidate(60, held_out(0.6))
    shutil.rmtree(first.stage_dir("finetuned", MODEL))
    with pytest.raises(ArtifactError, match=r"fine-tuned model of tiny is missing.*refrag run finetuned"):
        promote(first, MODEL)
    override(first, "finetuned", {"steps": 61})
    runner.run_stage(first, "finetuned", MODEL)
    with pytest.raises(ArtifactError, match=r"chunk-embedding store of tiny was made from finetuned .* one chain"):
        promote(first, MODEL)


def test_what_was_not_judged_is_not_released(second: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    old, before = rollback(second, MODEL), all_tags(second)
    monkeypatch.setattr(promotion, "commit_run", lambda *arguments: old.commit)
    with pytest.raises(ArtifactError, match="replaced while they were judged"):
        promote(second, MODEL)
    assert all_tags(second) == before


def test_an_unreachable_remote_is_named_and_changes_nothing(first: Project, candidate: Make) -> None:
    old, tags = released(first, MODEL), all_tags(first)
    assert old is not None
    new = candidate(60, held_out(0.6))
    lock = (first.root / "dvc.lock").read_bytes()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/dvc"
        dvc.set_remote(first, url)
        with pytest.raises(RefragError, match=rf"dvc push.*{url}.*failed"):
            dvc.push(first, MODEL)
        # Now the gate can't have the released version, by which it judges.
        shutil.rmtree(first.root / ".dvc" / "cache")
        with pytest.raises(
            RefragError, match=rf"neither in DVC's cache nor in its remote {url}, if that can be reached"
        ):
            promote(first, MODEL)
    assert (all_tags(first), released(first, MODEL)) == (tags, old)
    assert (first.root / "dvc.lock").read_bytes() == lock
    assert folder_digest(first.content("finetuned", MODEL)) == new["finetuned"]


def test_what_was_never_recorded_is_not_replaced(first: Project, candidate: Make) -> None:
    release = released(first, MODEL)
    assert release is not None
    new = candidate(60, held_out(0.6))
    with pytest.raises(ArtifactError, match=r"was never recorded.*refrag commit --model tiny"):
        restore(first, release)
    assert folder_digest(first.content("finetuned", MODEL)) == new["finetuned"]


def test_a_release_is_restored_without_touching_anything_else(second: Project) -> None:
    new, old = released(second, MODEL), rollback(second, MODEL)
    assert new is not None
    (second.work_dir("finetuned", MODEL) / "state").mkdir()
    (second.root / "README.md").write_text("edited\n")
    before = (git(second, "status", "--porcelain"), (second.root / "dvc.lock").read_bytes(), git(second, "diff"))
    assert restore(second, old) == ["finetuned", "chunks", "policy", "package"]
    for stage in SERVED:
        made = published(second, stage, MODEL)
        assert made is not None and made.hash == old.hashes[stage]
    assert published(second, "evaluation", MODEL).hash == new.hashes["evaluation"]  # type: ignore[union-attr]
    assert (second.work_dir("finetuned", MODEL) / "state").is_dir(), "an interrupted training can still continue"
    assert (
        git(second, "status", "--porcelain"),
        (second.root / "dvc.lock").read_bytes(),
        git(second, "diff"),
    ) == before
    assert restore(second, old) == []
    run(second.root, "dvc", "checkout", "--force", dvc.target("finetuned", MODEL))
    assert folder_digest(second.content("finetuned", MODEL)) == new.hashes["finetuned"]


def test_another_clone_gets_the_release_from_the_remote(
    second: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(tmp_path, "git", "clone", "--quiet", str(second.root), "clone")
    clone = Project(tmp_path / "clone")
    release = released(clone, MODEL)
    assert release == released(second, MODEL) and release is not None
    set_remote(clone, tmp_path / "nowhere")
    with pytest.raises(RefragError, match=r"tiny v1.1.0 are neither in DVC's cache nor in its remote.*refrag push"):
        restore(clone, release)
    assert not clone.stage_dir("finetuned", MODEL).exists()
    set_remote(clone, second.root.parent / "remote")
    output = release_command(clone, monkeypatch, "restore", MODEL)
    assert output.count("restored") == len(SERVED)
    for stage in SERVED:
        assert folder_digest(clone.content(stage, MODEL)) == release.hashes[stage]
    assert git(clone, "status", "--porcelain") == ""


def test_what_is_not_there_is_named(repository: Project, first: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert released(repository, MODEL) is None
    for command in ("rollback", "show", "restore"):
        output = release_command(repository, monkeypatch, command, MODEL, status=2)
        assert f"refrag release promote {MODEL}" in output
    assert "there are: v1.0.0" in release_command(first, monkeypatch, "show", MODEL, "--version", "v9", status=2)
    git(first, "tag", "--annotate", "--message", "withdrawn", f"{MODEL}#prod!#2", released(first, MODEL).commit)  # type: ignore[union-attr]
    assert released(first, MODEL) is None
    git(first, "tag", f"{MODEL}#prod#3", "main")
    with pytest.raises(RefragError, match="no tag tiny@v"):
        released(first, MODEL)
