"""`refrag commit` records a run in Git on a branch of its own, and a fresh clone gets all of it back."""

from pathlib import Path

import pytest

from refrag_platform import runner
from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import FILE_NAME, Manifest, published
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.history import dvc
from refrag_platform.history.runs import commit_run
from refrag_platform.project import Project
from refrag_platform.stages import STAGES
from tests.planted import MODEL, override, plant, run

BRANCH = f"runs/{MODEL}"


def git(project: Project, *arguments: str) -> str:
    return run(project.root, "git", *arguments).strip()


def test_commit_push_fresh_clone_and_pull_restore_every_artifact(recorded: Project, tmp_path: Path) -> None:
    commit = commit_run(recorded, MODEL, "First run")
    run(recorded.root, "dvc", "push")
    run(tmp_path, "git", "clone", "--quiet", "--branch", BRANCH, str(recorded.root), "clone")
    clone = Project(tmp_path / "clone")
    dvc.set_remote(clone, str(recorded.root.parent / "remote"))
    run(clone.root, "dvc", "pull")
    assert git(clone, "rev-parse", "HEAD") == commit
    assert git(clone, "log", "-1", "--format=%s") == "First run"
    for stage in STAGES:
        there = Manifest.read(clone.stage_dir(stage, MODEL))
        assert there == Manifest.read(recorded.stage_dir(stage, MODEL))
        assert folder_digest(clone.content(stage, MODEL)) == there.hash
    assert git(clone, "status", "--porcelain") == ""
    assert clone.models() == [MODEL]
    assert dvc.is_recorded(clone, "package", MODEL)
    assert runner.run_stage(clone, "package", MODEL).cached


def test_the_wrappers_push_and_pull_one_model(recorded: Project) -> None:
    dvc.push(recorded, MODEL)
    run(recorded.root, "rm", "-rf", ".dvc/cache", *(str(recorded.content(stage, MODEL)) for stage in STAGES))
    dvc.pull(recorded, MODEL)
    assert published(recorded, "finetuned", MODEL) is not None
    with pytest.raises(ArtifactError, match="records no artifact of smollm2-135m"):
        dvc.push(recorded, "smollm2-135m")


def test_the_users_branch_index_and_files_stay_as_they_are(recorded: Project) -> None:
    (recorded.root / "pyproject.toml").write_text("staged\n")
    git(recorded, "add", "pyproject.toml")
    (recorded.root / "pyproject.toml").write_text("staged and edited\n")
    (recorded.root / "note.txt").write_text("untracked\n")
    before = (
        git(recorded, "status", "--porcelain"),
        git(recorded, "diff", "--cached"),
        git(recorded, "rev-parse", "HEAD"),
    )
    commit_run(recorded, MODEL)
    after = (
        git(recorded, "status", "--porcelain"),
        git(recorded, "diff", "--cached"),
        git(recorded, "rev-parse", "HEAD"),
    )
    assert after == before
    assert git(recorded, "symbolic-ref", "--short", "HEAD") == "main"
    assert git(recorded, "show", f"{BRANCH}:pyproject.toml") == git(recorded, "show", "HEAD:pyproject.toml")
    assert "note.txt" not in git(recorded, "ls-tree", "--name-only", BRANCH)


def test_the_commit_holds_dvc_lock_the_manifests_and_the_settings_that_made_them(recorded: Project) -> None:
    override(recorded, "serving", {"passages": 3})
    for stage in STAGES:
        runner.run_stage(recorded, stage, MODEL)
    commit_run(recorded, MODEL)
    added = git(recorded, "diff", "--name-only", "--diff-filter=A", "HEAD", BRANCH).split()
    manifests = [
        (recorded.stage_dir(stage, MODEL) / FILE_NAME).relative_to(recorded.root).as_posix() for stage in STAGES
    ]
    assert {"dvc.lock", *manifests} <= set(added)
    assert not [name for name in added if "/content/" in name]
    assert "passages: 3" in git(recorded, "show", f"{BRANCH}:params.yaml")
    assert "passages: 3" not in git(recorded, "show", "HEAD:params.yaml")
    hashes = {Manifest.read(recorded.stage_dir(stage, MODEL)).hash for stage in STAGES}
    assert hashes == {dvc.recorded_hash(recorded, stage, MODEL) for stage in STAGES}


def test_runs_follow_each_other_and_the_code_that_made_them(recorded: Project) -> None:
    first = commit_run(recorded, MODEL)
    assert git(recorded, "rev-parse", f"{first}^@") == git(recorded, "rev-parse", "HEAD")
    assert commit_run(recorded, MODEL) == first, "nothing new, no new commit"
    (recorded.root / "README.md").write_text("More words\n")
    git(recorded, "add", "README.md")
    git(recorded, "commit", "--quiet", "--message", "Words")
    second = commit_run(recorded, MODEL)
    assert git(recorded, "rev-parse", f"{second}^@").split() == [first, git(recorded, "rev-parse", "HEAD")]
    assert git(recorded, "show", f"{BRANCH}:README.md") == "More words"


def test_a_machine_without_a_git_identity_can_commit_runs(
    recorded: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(recorded, "config", "--remove-section", "user")
    git(recorded, "config", "user.useConfigOnly", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    commit = commit_run(recorded, MODEL)
    assert git(recorded, "log", "-1", "--format=%an", commit) == "refrag"


def test_stale_artifacts_are_not_committed(repository: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(ArtifactError, match="no artifact to commit"):
        commit_run(repository, MODEL)
    runner.run_stage(repository, "corpus", MODEL)
    (repository.source_dir(MODEL) / "late.txt").write_text("Dropped in after the corpus was made.")
    with pytest.raises(ArtifactError, match="changed since"):
        commit_run(repository, MODEL)


def test_a_model_that_params_yaml_does_not_name_is_refused(recorded: Project) -> None:
    (recorded.root / "params.yaml").write_text("models: []\noverrides: {}\n")
    with pytest.raises(RefragError, match=f"refrag recipes add {MODEL}"):
        commit_run(recorded, MODEL)


def test_a_branch_that_is_checked_out_is_left_alone(recorded: Project) -> None:
    commit_run(recorded, MODEL)
    git(recorded, "symbolic-ref", "HEAD", f"refs/heads/{BRANCH}")
    with pytest.raises(RefragError, match="is checked out here"):
        commit_run(recorded, MODEL)
