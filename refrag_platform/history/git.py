"""Git as a program, and what it says when it refuses: its own words come along."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from refrag_platform.errors import RefragError
from refrag_platform.progress import say

NOBODY = {"NAME": "refrag", "EMAIL": "refrag@localhost"}
NOT_INSTALLED = "the program git is not installed"


class Git:
    """Git in one repository, on the user's index or on one of its own.

    Raises:
        RefragError: there is a repository, and Git refuses it: it is another user's, say.
    """

    def __init__(self, root: Path, index: Path | None = None) -> None:
        self.root = root
        self.environment = dict(os.environ)
        if in_checkout(root) and (reason := refusal(root)):
            raise RefragError(f"Git can't be used on {root}:\n{reason}")
        if index is not None:
            self.environment["GIT_INDEX_FILE"] = str(index)
        for role in ("AUTHOR", "COMMITTER"):
            if self.run("var", f"GIT_{role}_IDENT", check=False):
                continue
            for key, value in NOBODY.items():  # a machine without a Git identity can record runs too
                self.environment[f"GIT_{role}_{key}"] = value

    def run(self, *arguments: str, text: str | None = None, check: bool = True) -> str:
        """The output of a Git command that reads `text`.

        Raises:
            RefragError: it failed and `check` is set.
        """
        return self.bytes_of(*arguments, text=text, check=check).decode("utf-8", "replace").strip()

    def bytes_of(self, *arguments: str, text: str | None = None, check: bool = True) -> bytes:
        """The output as it is; text, check, Raises: as of `run`."""
        result = call(self.root, *arguments, env=self.environment, input=None if text is None else text.encode())
        if result.returncode and check:
            raise RefragError(f"`git {' '.join(arguments[:2])}` failed:\n{_words(result)}")
        return result.stdout

    def revision(self, name: str) -> str | None:
        """The commit that a name stands for, or None."""
        return self.run("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", check=False) or None

    def contains(self, commit: str, other: str) -> bool:
        """Whether `other` is among the ancestors of `commit`."""
        return self.run("merge-base", commit, other, check=False) == other


def call(
    root: Path, *arguments: str, env: dict[str, str] | None = None, input: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    """One Git command in `root`; a machine without Git answers as a command that failed."""
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, env=env, input=input, capture_output=True, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, b"", NOT_INSTALLED.encode())


def in_checkout(root: Path) -> bool:
    """Whether a repository is around `root`, whatever Git says of it."""
    return "GIT_DIR" in os.environ or any((folder / ".git").exists() for folder in (root, *root.parents))


def refusal(root: Path) -> str | None:
    """Why Git doesn't work on `root`, in its own words; None if it does."""
    result = call(root, "rev-parse", "--git-dir")
    return _words(result) if result.returncode else None


def git_commit(root: Path) -> str:
    """HEAD's hash, with `+` when tracked files differ; empty outside a Git repository.

    A repository that Git refuses has no commit to record either; its reason is said.
    """

    def output(*arguments: str) -> str:
        result = call(root, *arguments)
        return result.stdout.decode("utf-8", "replace").strip() if result.returncode == 0 else ""

    if in_checkout(root) and (reason := refusal(root)):
        say(f"the commit of {root} is not recorded, because Git can't be used there:\n{reason}")
        return ""
    commit = output("rev-parse", "HEAD")
    return commit + ("+" if commit and output("status", "--porcelain", "--untracked-files=no") else "")


def _words(result: subprocess.CompletedProcess[bytes]) -> str:
    said = (result.stderr.strip() or result.stdout.strip()).decode("utf-8", "replace")
    return said or f"it ended with status {result.returncode} and said nothing"
