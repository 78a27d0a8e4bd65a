"""A thin layer over DVC's own command line: record an artifact, is it recorded, push and pull.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import yaml

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.corpus.listing import no_file
from refrag_platform.corpus.text import is_unicode
from refrag_platform.dials import require_named
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.files import lock_file, whole
from refrag_platform.history import git
from refrag_platform.history.freshness import Standing, standing
from refrag_platform.history.pipeline import RECIPE, write_resolved
from refrag_platform.names import name_text
from refrag_platform.project import Project
from refrag_platform.stages import STAGES

LOCK_FILE = "dvc.lock"


def target(stage: str, model: str) -> str:
    """The stage's name in dvc.yaml and dvc.lock."""
    return f"{stage}@{model}"


def require_recordable(project: Project, stage: str, model: str) -> None:
    """Refuse to make what DVC couldn't record.

    Raises:
        RefragError: no Git or DVC repository here, or a source that DVC can't hash.
    """
    ensure_repo(project)
    require_hashable(project, stage, model)


def is_recorded(project: Project, stage: str, model: str) -> bool:
    """Whether dvc.lock names the artifact in place, and what it is made from as that is now.

    Raises:
        RefragError: as `require_recordable`, or DVC fails.
    """
    require_recordable(project, stage, model)
    try:
        if Manifest.read(project.stage_dir(stage, model)).hash != recorded_hash(project, stage, model):
            return False
    except ArtifactError:
        return False
    write_resolved(project, model)
    return not json.loads(_dvc(project, "status", "--json", target(stage, model)))


def record(project: Project, stage: str, model: str, place: Standing | None = None) -> str:
    """Enter the artifact in place into dvc.lock and DVC's cache; return its hash.

    Run it after the stage has been published and its checks have passed. One writer at a time: it waits
    for DVC's lock.

    Args:
        place: the artifact's standing, where the caller knows it: all that it is made from is not hashed again then.
            One from before the stage ran is none: what changed during the run would be taken for what it was made from.

    Raises:
        ArtifactError: there is no artifact, its bytes are not its manifest's, or what it is made from changed since.
        RefragError: no Git or DVC repository here, params.yaml does not name the model, or DVC fails.
    """
    return record_all(project, {stage: place}, model)[stage]


def record_all(project: Project, places: Mapping[str, Standing | None], model: str) -> dict[str, str]:
    """As `record`, of several stages, each with its standing where it is known; return the hash of each.

    DVC is started once for all of them, and for none where one is refused.

    Raises:
        ArtifactError, RefragError: as `record`.
    """
    for stage, place in places.items():
        if (place or standing(project, stage, model)).state == "stale":
            raise ArtifactError(
                f"inputs, settings or code of {stage} changed since {project.stage_dir(stage, model)} was made, "
                f"so it can't be recorded as made from them; run `refrag run {stage} --model {model}` again"
            )
        require_hashable(project, stage, model)
    manifests = {stage: Manifest.read(project.stage_dir(stage, model)) for stage in places}
    require_named(project, model)
    write_resolved(project, model)
    targets = [target(stage, model) for stage in (RECIPE, *places)]
    _dvc(project, "commit", "--force", *targets, writes=True)
    for stage, manifest in manifests.items():
        if (recorded := recorded_hash(project, stage, model)) != manifest.hash:
            raise ArtifactError(
                f"DVC hashes {project.content(stage, model)} to {recorded}, its manifest says {manifest.hash}: the "
                f"files were changed; make them again with `refrag run {stage} --model {model}`"
            )
    return {stage: manifest.hash for stage, manifest in manifests.items()}


def recorded_hash(project: Project, stage: str, model: str) -> str | None:
    """The hash of the artifact in dvc.lock; None when it was never recorded.

    Raises:
        RefragError: dvc.lock can't be read.
    """
    path = project.root / LOCK_FILE
    if not path.is_file():
        return None
    with _alone(project):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        lock = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise RefragError(
            f"{path} is damaged ({str(error).splitlines()[0]}); delete it: the next run enters every artifact again"
        ) from None
    outs = (lock or {}).get("stages", {}).get(target(stage, model), {}).get("outs", [])
    return next((out["md5"] for out in outs), None)


def push(project: Project, model: str | None = None) -> None:
    """Copy recorded artifacts to the remote; all of them, or those of one model."""
    _transfer(project, "push", *_recorded(project, model))


def pull(project: Project, model: str | None = None) -> None:
    """Fetch recorded artifacts from the remote into their places; all of them, or those of one model."""
    _transfer(project, "pull", "--force", "--allow-missing", *_recorded(project, model))


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


def remote_url(project: Project) -> str:
    """Where push and pull go."""
    # One `name=value` a line; what this clone sets follows what the project sets.
    settings = dict(line.split("=", 1) for line in _dvc(project, "config", "--list").splitlines())
    return settings.get(f"remote.{settings.get('core.remote')}.url", "(none is set)")


def cache_folder(project: Project) -> Path:
    """Where DVC keeps the bytes of recorded artifacts, links resolved."""
    return (project.root / _dvc(project, "cache", "dir").strip()).resolve()


def drop_unused(project: Project, kept: Path) -> None:
    """Remove from DVC's cache what neither the workspace nor the DVC project in the folder `kept` names."""
    _dvc(project, "gc", "--workspace", "--force", "--projects", str(kept))


def ensure_repo(project: Project) -> None:
    """Check that the project is a Git repository with DVC set up, which every clone is.

    Raises:
        RefragError: it is not, or DVC is not installed; with the command that mends it.
    """
    if importlib.util.find_spec("dvc") is None:
        raise RefragError("DVC is not installed; `pip install '.[orchestrate]'` in the checkout")
    reason = git.refusal(project.root)
    if reason and git.in_checkout(project.root):
        raise RefragError(f"Git can't be used on {project.root}, and DVC needs it:\n{reason}")
    if reason:
        raise RefragError(
            f"{project.root} is not in a Git repository, which DVC needs; clone it or `git init`. Git says: {reason}"
        )
    if not (project.root / ".dvc" / "config").is_file():
        raise RefragError(f"{project.root} has no .dvc/config; `dvc init` makes it")


def require_hashable(project: Project, stage: str, model: str) -> None:
    """Check what DVC hashes before the corpus: a name that isn't UTF-8 or a dangling link ends it, a pipe holds it up
    for ever. `refrag run` reads past them.

    Raises:
        RefragError: there is such a thing in data/sources/NAME.
    """
    if stage != "corpus":
        return
    for base, folders, names in os.walk(project.source_dir(model)):
        for name in (*folders, *names):
            path = Path(base) / name
            said = (no_file(path) if name in names else None) or (None if is_unicode(name) else "its name is not UTF-8")
            if said:
                raise RefragError(
                    f"DVC can't hash {name_text(path.relative_to(project.root))} ({said}): remove or rename it, or "
                    "keep it in a folder elsewhere that corpus.sources names by its path"
                )


def _recorded(project: Project, model: str | None) -> list[str]:
    """DVC targets of one model's recorded stages; no target means all."""
    if model is None:
        return []
    names = [target(stage, model) for stage in STAGES if recorded_hash(project, stage, model)]
    if not names:
        raise ArtifactError(f"dvc.lock records no artifact of {model}; `dvc repro` or `make demo` makes them")
    return names


def _transfer(project: Project, verb: str, *arguments: str) -> None:
    """Push or pull; DVC's own message does not say which remote it is that can't be reached."""
    try:
        _dvc(project, verb, *arguments)
    except RefragError as error:
        raise RefragError(f"dvc {verb} with the remote {remote_url(project)} failed: {error}") from None


def _dvc(project: Project, *arguments: str, writes: bool = False) -> str:
    """Run DVC in the project and return what it prints; it waits for other writers. `writes`: dvc.lock."""
    ensure_repo(project)
    with _alone(project) as lock:
        if writes:
            try:
                _keep_lock_file(project)
            except OSError as error:
                raise RefragError(f"dvc.lock can't be kept while DVC writes it: {error}") from None
        # DVC lives on when this process is killed, and with it the lock.
        result = call(project.root, *arguments, pass_fds=[lock.fileno()])
        if result.returncode:
            message = result.stderr.strip() or result.stdout.strip()
            raise RefragError(f"`dvc {' '.join(arguments)}` failed:\n{message}")
        _kept(project).unlink(missing_ok=True)
    return result.stdout


def call(root: Path, *arguments: str, pass_fds: Sequence[int] = ()) -> subprocess.CompletedProcess[str]:
    """One DVC command in the project at `root`; it waits for other writers."""
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    return subprocess.run(
        command, cwd=root, env=environment, pass_fds=pass_fds, capture_output=True, text=True, check=False
    )


@contextmanager
def _alone(project: Project) -> Iterator[TextIO]:
    """Hold the project's lock of this module; a dvc.lock whose writer was killed is restored first."""
    kept = _kept(project)
    with lock_file(kept.with_name("refrag.lock")) as lock:
        if kept.is_file() and kept.stat().st_size:
            kept.replace(project.root / LOCK_FILE)
        elif kept.is_file():  # there was none before
            (project.root / LOCK_FILE).unlink(missing_ok=True)
            kept.unlink()
        yield lock


def _keep_lock_file(project: Project) -> None:
    """Keep dvc.lock as it is until DVC has written the new one: it does so in place, and a kill leaves half of it."""
    lock = project.root / LOCK_FILE
    with whole(_kept(project)) as partial:
        partial.write_bytes(lock.read_bytes() if lock.is_file() else b"")


def _kept(project: Project) -> Path:
    return project.root / ".dvc" / "tmp" / f"{LOCK_FILE}.kept"
