"""Where Git refuses, its own reason is what a user reads."""

import shutil
from pathlib import Path

import pytest

from refrag_platform.errors import RefragError
from refrag_platform.history import dvc
from refrag_platform.history.git import Git, git_commit
from refrag_platform.history.versions import released
from refrag_platform.project import Project
from tests.command import refused


@pytest.fixture
def foreign(repository: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A checkout that Git takes for another user's."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    # Nothing of this machine's settings may say that it is safe.
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    monkeypatch.chdir(repository.root)
    return repository


def test_a_checkout_of_another_user_is_said_to_be_that(foreign: Project) -> None:
    for ask in (dvc.ensure_repo, lambda project: Git(project.root), lambda project: released(project, "tiny")):
        with pytest.raises(RefragError, match=r"(?s)Git can't be used on .*dubious ownership.*safe\.directory"):
            ask(foreign)
    for command in (["commit", "--model", "tiny"], ["release", "ls", "tiny"], ["forget", "notes.txt"]):
        assert "safe.directory" in refused(*command)


def test_a_run_goes_on_without_a_commit_and_says_why(foreign: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert git_commit(foreign.root) == ""
    assert "safe.directory" in capsys.readouterr().err


def test_outside_a_repository_nothing_is_said_but_where_dvc_needs_one(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert git_commit(project.root) == "" and capsys.readouterr().err == ""
    assert Git(project.root).revision("HEAD") is None
    with pytest.raises(RefragError, match=r"is not in a Git repository.*git init.*Git says: .*not a git repository"):
        dvc.ensure_repo(project)


def test_a_machine_without_git_is_told_so(
    repository: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("git") is None
    assert git_commit(repository.root) == "" and "git is not installed" in capsys.readouterr().err
    with pytest.raises(RefragError, match="git is not installed"):
        dvc.ensure_repo(repository)


def test_what_a_git_command_says_comes_along(repository: Project) -> None:
    with pytest.raises(RefragError, match=r"(?s)`git archive --format=tar` failed:.*no-such-commit"):
        Git(repository.root).bytes_of("archive", "--format=tar", "no-such-commit")
