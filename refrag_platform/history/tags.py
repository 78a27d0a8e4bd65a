"""Git tags in GTO's form: MODEL@v1.2.3 registers a version, MODEL#prod#N makes it the released one.

The tags are annotated and say all there is to say: nothing is ever moved or deleted, the assignment with the
highest N holds. `gto show`, `gto history` and `dvc artifacts get --stage prod` read the same tags.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from refrag_platform.history.git import Git

STAGE = "prod"
FIRST = (1, 0, 0)
Bump = Literal["major", "minor", "patch"]
FIELD, RECORD = "\x01", "\x02"
FORMAT = (
    "%(refname:strip=2)%01%(if)%(*objectname)%(then)%(*objectname)%(else)%(objectname)%(end)%01"
    "%(creatordate:iso-strict)%01%(contents:subject)%01%(contents:body)%02"
)


@dataclass(frozen=True)
class ModelVersion:
    """A registered version: where it is, since when, and the tag's message."""

    number: tuple[int, int, int]
    commit: str
    date: str
    subject: str
    body: str

    @property
    def name(self) -> str:
        return "v" + ".".join(map(str, self.number))


@dataclass(frozen=True)
class Assignment:
    """`commit` became prod, or (`cancelled`, GTO's `prod!`) ceased to be. In the order of `count`."""

    count: int
    commit: str
    date: str
    cancelled: bool


def versions(git: Git, model: str) -> list[ModelVersion]:
    """All versions of a model, oldest number first."""
    pattern = re.compile(rf"{re.escape(model)}@v(\d+)\.(\d+)\.(\d+)")
    registered = []
    for name, commit, date, subject, body in _tags(git, f"{model}@v*"):
        if match := pattern.fullmatch(name):
            major, minor, patch = map(int, match.groups())
            registered.append(ModelVersion((major, minor, patch), commit, date, subject, body))
    return sorted(registered, key=lambda version: version.number)


def assignments(git: Git, model: str) -> list[Assignment]:
    """What was prod, oldest first."""
    pattern = re.compile(rf"{re.escape(model)}#{STAGE}(!?)#(\d+)")
    assigned = []
    for name, commit, date, _, _ in _tags(git, f"{model}#*"):
        if match := pattern.fullmatch(name):
            assigned.append(Assignment(int(match[2]), commit, date, bool(match[1])))
    return sorted(assigned, key=lambda assignment: assignment.count)


def register(git: Git, model: str, commit: str, message: str, bump: Bump = "minor") -> ModelVersion:
    """Tag `commit` as the next version of a model: the first is v1.0.0.

    Raises:
        RefragError: Git refuses, e.g. because another process registered that version meanwhile.
    """
    known = versions(git, model)
    number = _next(known[-1].number, bump) if known else FIRST
    name = f"{model}@v" + ".".join(map(str, number))
    _tag(git, name, commit, message)
    return next(version for version in versions(git, model) if version.number == number)


def assign(git: Git, model: str, commit: str, message: str) -> str:
    """Make `commit` the released one; return the tag.

    Raises:
        RefragError: Git refuses, e.g. because another process released something meanwhile.
    """
    # GTO counts over all stages of an artifact.
    numbered = re.compile(rf"{re.escape(model)}[#@].*#(\d+)")
    names = [name for pattern in (f"{model}#*", f"{model}@*") for name, *_ in _tags(git, pattern)]
    counts = [int(match[1]) for name in names if (match := numbered.fullmatch(name))]
    name = f"{model}#{STAGE}#{max(counts, default=0) + 1}"
    _tag(git, name, commit, message)
    return name


def _next(number: tuple[int, int, int], bump: Bump) -> tuple[int, int, int]:
    major, minor, patch = number
    return {"major": (major + 1, 0, 0), "minor": (major, minor + 1, 0), "patch": (major, minor, patch + 1)}[bump]


def _tag(git: Git, name: str, commit: str, message: str) -> None:
    git.run("tag", "--annotate", "--cleanup=verbatim", "--file=-", name, commit, text=message)


def _tags(git: Git, pattern: str) -> list[list[str]]:
    """name, commit, date, subject and body of each tag that matches."""
    listed = git.run("for-each-ref", f"--format={FORMAT}", f"refs/tags/{pattern}")
    return [entry.lstrip("\n").split(FIELD) for entry in listed.split(RECORD) if entry.strip()]
