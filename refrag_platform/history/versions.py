"""Which versions of a model were released, and which one is now. Run: `refrag release ls`.

A release is a commit on runs/MODEL (dvc.lock and every manifest) with a version tag on it; what the gate found
is in the tag's message. Git alone says which one is prod: a service needs neither DVC nor Dagster to look.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from refrag_platform.artifacts.manifest import FILE_NAME, Manifest
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.history import tags
from refrag_platform.history.git import Git
from refrag_platform.history.tags import ModelVersion
from refrag_platform.project import Project
from refrag_platform.stages import STAGES


@dataclass(frozen=True)
class Release:
    """A registered version. `manifests`: of every artifact of its commit, by stage; `record`: what decided."""

    model: str
    version: str
    commit: str
    date: str
    manifests: dict[str, Manifest]
    record: dict[str, Any]

    @property
    def hashes(self) -> dict[str, str]:
        """DVC's hash of every artifact, by stage."""
        return {stage: manifest.hash for stage, manifest in self.manifests.items()}

    @property
    def metrics(self) -> dict[str, Any]:
        """The evaluation's figures."""
        return self.manifests["evaluation"].metrics if "evaluation" in self.manifests else {}

    def plain(self) -> dict[str, Any]:
        """The release as JSON values."""
        facts = {name: getattr(self, name) for name in ("model", "version", "commit", "date", "hashes", "metrics")}
        return {**facts, "record": self.record}


def released(project: Project, model: str) -> Release | None:
    """The version that is prod; None when nothing was released, or the release was withdrawn (`prod!`).

    Raises:
        RefragError: no Git repository, or the prod tag is on a commit that is no version.
        ArtifactError: a manifest in that commit can't be read.
    """
    git = Git(project.root)
    history = tags.assignments(git, model)
    if not history or history[-1].cancelled:
        return None
    return read_release(project, git, model, version_at(git, model, history[-1].commit))


def releases(project: Project, model: str) -> list[Release]:
    """Every registered version, oldest number first."""
    git = Git(project.root)
    return [read_release(project, git, model, version) for version in tags.versions(git, model)]


def release_named(project: Project, model: str, version: str, named_by: str = "continue_from") -> Release:
    """The registered version that the setting or option `named_by` names.

    Raises:
        RefragError: there is none of that name.
    """
    known = {release.version: release for release in releases(project, model)}
    if version not in known:
        raise RefragError(
            f"{named_by} of {model} is {version!r}, which is no version of it; there are: {', '.join(known) or 'none'}"
        )
    return known[version]


def version_at(git: Git, model: str, commit: str) -> ModelVersion:
    """The version that `commit` was registered as; the highest, if as several.

    Raises:
        RefragError: it was not.
    """
    registered = [version for version in tags.versions(git, model) if version.commit == commit]
    if not registered:
        raise RefragError(
            f"{model}#{tags.STAGE} is assigned to commit {commit[:12]}, which no tag {model}@v... registers; "
            "fetch all tags with `git fetch --tags`"
        )
    return registered[-1]


def read_release(project: Project, git: Git, model: str, version: ModelVersion) -> Release:
    """A version with the manifests of its commit.

    Raises:
        ArtifactError: one of them can't be read.
    """
    try:
        record = json.loads(version.body) if version.body.strip() else {}
    except ValueError:  # a tag made by hand or by GTO
        record = {}
    manifests = read_manifests(project, git, model, version.commit)
    return Release(model, version.name, version.commit, version.date, manifests, record)


def read_manifests(project: Project, git: Git, model: str, commit: str) -> dict[str, Manifest]:
    """The manifests of a model that a commit holds, by stage.

    Raises:
        ArtifactError: one of them can't be read.
    """
    manifests = {}
    for stage in STAGES:
        path = (project.stage_dir(stage, model) / FILE_NAME).relative_to(project.root).as_posix()
        text = git.run("show", f"{commit}:{path}", check=False)
        if text:
            try:
                manifests[stage] = Manifest.model_validate_json(text)
            except ValidationError as error:
                raise ArtifactError(
                    f"{path} at {commit[:12]} can't be read ({error.error_count()} faults); it was written by "
                    "another version of this program"
                ) from None
    return manifests
