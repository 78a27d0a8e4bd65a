"""A thin layer over DVC's own command line: is a stage current, record it, push and pull.

DVC runs as a program, not as a library: its command line is its stable interface, it takes half a
second, and a process of its own keeps DVC's locks and caches out of Dagster's. By hand: `dvc status`,
`dvc repro`, `dvc push`, `dvc pull`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.project import Project
from refrag_platform.stages import STAGES, made_from_current
from refrag_platform.versioning.manifest import Manifest


def target(stage: str, model: str) -> str:
    """The stage's name in dvc.yaml and dvc.lock."""
    return f"{stage}@{model}"


def is_current(project: Project, stage: str, model: str) -> bool:
    """Whether dependencies, parameters, code and output are those that dvc.lock names.

    The manifest must be in place and belong to that output too: later stages read it.

    Raises:
        RefragError: no Git or DVC repository here, or DVC fails.
    """
    ensure_repo(project)
    try:
        manifest = Manifest.read(project.stage_dir(stage, model))
        if manifest.hash != recorded_hash(project, stage, model) or not made_from_current(project, manifest):
            return False
    except ArtifactError:
        return False
    return not json.loads(_dvc(project, "status", "--json", target(stage, model)))


def record(project: Project, stage: str, model: str) -> str:
    """Enter the artifact in place into dvc.lock and DVC's cache; return its hash.

    Run it after the stage has been published and its checks have passed. One writer at a time: it waits
    for DVC's lock.

    Raises:
        ArtifactError: there is no artifact, or what it is made from changed since it was made.
        RefragError: no Git or DVC repository here, or DVC fails.
    """
    manifest = Manifest.read(project.stage_dir(stage, model))
    if not made_from_current(project, manifest):
        raise ArtifactError(
            f"inputs, settings or code of {stage} changed since {project.stage_dir(stage, model)} was made, "
            f"so it can't be recorded as made from them; run `refrag run {stage} --model {model}` again"
        )
    _dvc(project, "commit", "--force", target(stage, model))
    found = recorded_hash(project, stage, model)
    if found != manifest.hash:
        raise ArtifactError(
            f"DVC hashes {project.content(stage, model)} to {found}, its manifest says {manifest.hash}: the "
            f"files were changed; make them again with `refrag run {stage} --model {model}`"
        )
    return manifest.hash


def recorded_hash(project: Project, stage: str, model: str) -> str | None:
    """The hash of the artifact in dvc.lock; None when it was never recorded."""
    path = project.root / "dvc.lock"
    if not path.is_file():
        return None
    lock = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    outs = (lock or {}).get("stages", {}).get(target(stage, model), {}).get("outs", [])
    return next((out["md5"] for out in outs), None)


def checkout(project: Project, stage: str, model: str) -> None:
    """Put the bytes that dvc.lock names back into place, from DVC's cache.

    Raises:
        RefragError: they are not in the cache (`refrag pull` fetches them), or DVC fails.
    """
    _dvc(project, "checkout", "--force", target(stage, model))


def push(project: Project, model: str | None = None) -> None:
    """Copy recorded artifacts to the remote; all of them, or those of one model."""
    _dvc(project, "push", *_recorded(project, model))


def pull(project: Project, model: str | None = None) -> None:
    """Fetch recorded artifacts from the remote into their places; all of them, or those of one model."""
    _dvc(project, "pull", "--force", "--allow-missing", *_recorded(project, model))


def set_remote(project: Project, url: str) -> None:
    """Make a folder (or any URL that DVC knows) the default remote of this clone only.

    Raises:
        RefragError: the folder lies inside the project, where a lost disk would take both.
    """
    if "://" not in url:
        folder = Path(url).expanduser().resolve()
        if folder.is_relative_to(project.root):
            raise RefragError(f"{folder} lies inside the project; a remote must be outside it")
        url = str(folder)
    _dvc(project, "remote", "add", "--local", "--force", "--default", "default", url)


def ensure_repo(project: Project) -> None:
    """Check that the project is a Git repository with DVC set up, which every clone is.

    Raises:
        RefragError: it is not, or DVC is not installed; with the command that mends it.
    """
    if importlib.util.find_spec("dvc") is None:
        raise RefragError("DVC is not installed; `pip install 'refrag-platform[orchestrate]'`")
    inside = subprocess.run(["git", "-C", str(project.root), "rev-parse"], capture_output=True, check=False)
    if inside.returncode:
        raise RefragError(f"{project.root} is not in a Git repository, which DVC needs; clone it or `git init`")
    if not (project.root / ".dvc" / "config").is_file():
        raise RefragError(f"{project.root} has no .dvc/config; `dvc init` makes it")


def _recorded(project: Project, model: str | None) -> list[str]:
    """DVC targets of one model's recorded stages; no target means all."""
    if model is None:
        return []
    names = [target(stage, model) for stage in STAGES if recorded_hash(project, stage, model)]
    if not names:
        raise ArtifactError(f"dvc.lock records no artifact of {model}; `dvc repro` or `make demo` makes them")
    return names


def _dvc(project: Project, *arguments: str) -> str:
    """Run DVC in the project and return what it prints; it waits for other writers."""
    ensure_repo(project)
    result = subprocess.run(
        [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments],
        cwd=project.root,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        message = result.stderr.strip() or result.stdout.strip()
        raise RefragError(f"`dvc {' '.join(arguments)}` failed:\n{message}")
    return result.stdout
