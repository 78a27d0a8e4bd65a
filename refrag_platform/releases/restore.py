"""A release's bytes: out of DVC's cache or remote, and back into place. Run: `refrag release restore MODEL`.

DVC checks them out into a folder of their own, laid out like the project at the release's commit: neither the
branch, the index, dvc.lock nor any file of the working tree changes, but the artifacts that are put back.
"""

from __future__ import annotations

import configparser
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from refrag_platform.artifacts import publication
from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import published
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.history import dvc
from refrag_platform.history.git import Git
from refrag_platform.history.versions import Release
from refrag_platform.project import Project

SERVED = ("finetuned", "chunks", "policy", "package")
PIPELINE = ("dvc.yaml", "dvc.lock", "params.yaml")


@contextmanager
def contents(project: Project, release: Release, stages: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Content folders of a release's artifacts, by stage; gone afterwards.

    Raises:
        ArtifactError: the release has no such artifact, or its bytes are not the manifest's.
        RefragError: neither DVC's cache nor its remote has them, or another process reads this model's releases.
    """
    for stage in stages:
        if stage not in release.manifests:
            raise ArtifactError(f"{release.model} {release.version} holds no {stage}; it has {list(release.manifests)}")
    dvc.ensure_repo(project)
    work = project.work_dir("restore", release.model)
    with publication.only_runner(work):
        view = Project(work / "view")
        shutil.rmtree(view.root, ignore_errors=True)
        view.root.mkdir()
        try:
            _check_out(project, view, release, stages)
            yield {stage: view.content(stage, release.model) for stage in stages}
        finally:
            shutil.rmtree(view.root, ignore_errors=True)


def restore(project: Project, release: Release) -> list[str]:
    """Put the artifacts that a release serves into their places; return the stages that were not there already.

    dvc.lock keeps naming what was there before, so `dvc checkout` (or the next run) brings that back.

    Raises:
        ArtifactError: an artifact in the way was never recorded and would be lost.
        RefragError: the bytes can't be had, or a stage is running.
    """
    waiting = [stage for stage in SERVED if not _in_place(project, release, stage)]
    for stage in waiting:
        _require_kept(project, release.model, stage)
    if waiting:
        with contents(project, release, waiting) as folders:
            for stage in waiting:
                _put(project, release, stage, folders[stage])
    return waiting


def _check_out(project: Project, view: Project, release: Release, stages: Sequence[str]) -> None:
    git = Git(project.root)
    for name in PIPELINE:
        text = git.run("show", f"{release.commit}:{name}")
        (view.root / name).write_text(f"{text}\n", encoding="utf-8")
    _configure(project, view)
    targets = [dvc.target(stage, release.model) for stage in stages]
    result = dvc.call(view.root, "pull", "--force", *targets)
    if result.returncode:
        raise RefragError(
            f"the bytes of {release.model} {release.version} are neither in DVC's cache nor in its remote "
            f"{dvc.remote_url(project)}, if that can be reached; `refrag push` where they were made copies them "
            f"there:\n{result.stderr.strip()}"
        )
    for stage in stages:
        digest = folder_digest(view.content(stage, release.model))
        if digest != release.hashes[stage]:
            raise ArtifactError(
                f"{stage} of {release.model} {release.version} has hash {digest}, its manifest says "
                f"{release.hashes[stage]}: DVC's cache is damaged; `dvc pull` from a remote mends it"
            )


def _configure(project: Project, view: Project) -> None:
    """Give the view the project's cache and remotes, and no Git: the project's ignores work/."""
    folder = project.root / ".dvc"
    settings = configparser.RawConfigParser()
    settings.read([folder / "config", folder / "config.local"], encoding="utf-8")
    settings.read_dict({name: {} for name in ("core", "cache") if not settings.has_section(name)})
    settings["core"]["no_scm"] = "true"
    settings["cache"].setdefault("dir", "cache")
    for section in settings.values():
        for key in ("url", "dir"):
            value = section.get(key)
            if value is not None and "://" not in value:  # DVC takes paths from its configuration's folder
                section[key] = str(folder / Path(value).expanduser())
    (view.root / ".dvc").mkdir()
    with (view.root / ".dvc" / "config").open("w", encoding="utf-8") as stream:
        settings.write(stream)


def _in_place(project: Project, release: Release, stage: str) -> bool:
    there = published(project, stage, release.model)
    return there is not None and there == release.manifests.get(stage)


def _require_kept(project: Project, model: str, stage: str) -> None:
    """What is in the way must be in DVC's cache."""
    content = project.content(stage, model)
    if content.is_dir() and folder_digest(content) != dvc.recorded_hash(project, stage, model):
        raise ArtifactError(
            f"{content} was never recorded, and putting the release in its place would lose it; "
            f"record it with `refrag commit --model {model}`, or move it away"
        )


def _put(project: Project, release: Release, stage: str, content: Path) -> None:
    """Exchange an artifact by two renames, which `publication.recover` completes if a kill comes between."""
    folder, work = project.stage_dir(stage, release.model), project.work_dir(stage, release.model)
    with publication.only_runner(work):
        publication.recover(folder, work)
        if (work / "ready").exists():  # of a run that was killed; `view` is deleted when all is done
            (work / "ready").rename(content.parent.parent / f"{stage}.unfinished")
        release.manifests[stage].write(content.parent)
        content.parent.rename(work / "ready")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rename(work / "old")
        publication.recover(folder, work)
