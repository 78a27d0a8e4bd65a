"""Which versions stay and which go: DVC's cache, BentoML's store, search tables. Run: `refrag gc --dry-run`.

What stays, with all that it was made from: tagged commits (releases), the last N on each runs/NAME, the tips of
other branches, and what is in place. Remotes are never touched, so `refrag pull` brings back what was pushed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from refrag_platform.artifacts.manifest import FILE_NAME, Manifest
from refrag_platform.artifacts.publication import only_runner
from refrag_platform.errors import RefragError
from refrag_platform.history import dvc
from refrag_platform.history.cache import FOLDER_MARK, Cache
from refrag_platform.history.commits import Kept, file_at, kept_commits, locked_hashes, manifests_at, recorded_manifests
from refrag_platform.project import Project
from refrag_platform.serving import bento
from refrag_platform.serving.package import PREFIX
from refrag_platform.stages import STAGES

CONFIG = "[core]\n    no_scm = true\n    analytics = false\n    site_cache_dir = {site}\n[cache]\n    dir = {cache}\n"
TABLES, REMOVED = "data/*/lance/*", ".removed"
HASH_LENGTH = 32

Commits = list[tuple[Kept, list[Manifest]]]


@dataclass(frozen=True)
class Garbage:
    """Something that nothing kept needs. `bytes`: what its removal frees."""

    kind: Literal["artifact", "files", "bento", "model", "tables"]
    name: str
    bytes: int
    path: Path | None = None


@dataclass
class Plan:
    """What would go, and what keeps the rest: `kept` by hash, `tags` of BentoML's store; `notes` for the user."""

    garbage: list[Garbage]
    kept: dict[str, str]
    tags: dict[str, str]
    cache: Cache
    notes: list[str] = field(default_factory=list)


def plan(project: Project, last: int) -> Plan:
    """Find what can go, removing nothing.

    Args:
        last: how many of each model's runs on runs/NAME stay.

    Raises:
        RefragError: no Git or DVC repository, or a dvc.lock or manifest in place that can't be read: then it isn't
            known what must stay.
    """
    dvc.ensure_repo(project)
    cache = Cache.of(project)
    commits = [(commit, _manifests(project, commit)) for commit in kept_commits(project, last)]
    kept = _kept_hashes(project, commits, cache)
    tags = _kept_tags(project, commits, kept, cache)
    result = Plan([], kept, tags, cache)
    root = project.root.resolve()
    if cache.folder.is_relative_to(root):
        result.garbage += _unused_objects(project, kept, cache)
    else:
        result.notes.append(
            f"DVC's cache {cache.folder} lies outside the project, where others may use it too, and is left alone; "
            "`dvc gc --projects` clears a shared one"
        )
    if bento.home(project).resolve().is_relative_to(root):
        result.garbage += _unused_tags(project, tags)
    else:
        result.notes.append(f"BentoML's store {bento.home(project)} lies outside the project and is left alone")
    for folder in sorted(project.root.glob(TABLES)):
        unused = len(folder.name) == HASH_LENGTH and f"{folder.name}{FOLDER_MARK}" not in kept
        if folder.is_dir() and (unused or folder.name.startswith(REMOVED)):
            name = folder.relative_to(project.root).as_posix()
            result.garbage.append(Garbage("tables", name, _size(folder), folder))
    return result


def collect(project: Project, last: int) -> Plan:
    """Remove what `plan` finds; return the plan. Killed at any moment, it has touched nothing that is kept.

    Raises:
        RefragError: as `plan`; a model is being packaged right now; DVC or BentoML fails.
    """
    with ExitStack() as locks:
        # What the package stage has put into the store is named by its package.json only once that is in place.
        for model in sorted({tag.split(":")[0].removeprefix(PREFIX) for tag in _store(project, "models")}):
            locks.enter_context(only_runner(project.work_dir("package", model)))
        removed = plan(project, last)
        for kind, verb in (("bento", []), ("model", ["models"])):  # never a Bento without its model
            if names := [item.name for item in removed.garbage if item.kind == kind]:
                _bentoml(project, [*verb, "delete", "--yes", *names])
    for item in removed.garbage:
        if item.kind == "tables" and item.path is not None:
            _delete_tables(item.path)
    if any(item.kind in {"artifact", "files"} for item in removed.garbage):
        with tempfile.TemporaryDirectory(prefix="refrag-kept-") as folder:
            _write_kept(Path(folder), removed)
            dvc.drop_unused(project, Path(folder))
    return removed


def _manifests(project: Project, kept: Kept) -> list[Manifest]:
    manifests = manifests_at(project, kept.commit).values()
    return [manifest for manifest in manifests if kept.model in {None, manifest.model}]


def _kept_hashes(project: Project, commits: Commits, cache: Cache) -> dict[str, str]:
    """Why each artifact stays, by hash; what kept ones were made from included."""
    reasons: dict[str, str] = {}
    lock = project.root / dvc.LOCK_FILE
    if lock.is_file():
        for hash in locked_hashes(lock.read_text(encoding="utf-8")):
            reasons.setdefault(hash, "dvc.lock")
    for manifest in _in_place(project):
        for hash in (manifest.hash, *(record.hash for record in manifest.inputs.values())):
            reasons.setdefault(hash, "in place")
    for commit, manifests in commits:
        text = file_at(project, commit.commit, dvc.LOCK_FILE)
        hashes = locked_hashes(text, commit.model) if text else {}
        for hash in [*hashes, *(manifest.hash for manifest in manifests)]:
            reasons.setdefault(hash, commit.why)
    for hash, why in list(reasons.items()):
        for ancestor in cache.ancestors([hash]):
            reasons.setdefault(ancestor, f"behind {why}")
    return reasons


def _in_place(project: Project) -> Iterator[Manifest]:
    for path in project.root.glob(f"*/*/*/{FILE_NAME}"):
        if path.parent.name in STAGES:
            yield Manifest.read(path.parent)


def _unused_objects(project: Project, kept: dict[str, str], cache: Cache) -> Iterator[Garbage]:
    """A line for each version of an artifact that goes, with the bytes that only it holds."""
    there = set(cache.hashes())
    needed = {hash for folder in kept for hash in (folder, *cache.listing(folder).values())}
    unused = there - needed
    # The folder of every artifact ever committed.
    names = {manifest.hash: folder for _, folder, manifest in recorded_manifests(project) if manifest.hash in unused}
    folders = sorted((hash for hash in unused if hash.endswith(FOLDER_MARK)), key=lambda hash: names.get(hash, "~"))
    for folder in folders:
        hashes = {folder, *cache.listing(folder).values()} & unused
        unused -= hashes
        name = f"{names.get(folder, 'an artifact that was never committed')} {folder}"
        yield Garbage("artifact", name, sum(map(cache.size, hashes)))
    if unused:
        yield Garbage("files", f"{len(unused)} files of no artifact", sum(map(cache.size, unused)))


def _kept_tags(project: Project, commits: Commits, kept: dict[str, str], cache: Cache) -> dict[str, str]:
    """Tags of models and Bentos that stay, and why: named by a kept package, or served right now.

    A Bento's models stay with it.
    """
    tags: dict[str, str] = {}
    for content in project.root.glob(f"models/*/package/content/{bento.PACKAGE_FILE}"):
        tags |= dict.fromkeys(_package_tags(content.read_bytes()), "in place")
    for hash, why in kept.items():
        for tag in _package_tags(cache.read(hash, bento.PACKAGE_FILE)):
            tags.setdefault(tag, why)
    for commit, manifests in commits:  # the cache may not have the package
        for manifest in manifests:
            for tag in _package_tags(json.dumps(manifest.metrics).encode()) if manifest.stage == "package" else ():
                tags.setdefault(tag, commit.why)
    bentos = _store(project, "bentos")
    running = _running_words() if bentos else set()
    for tag, folder in bentos.items():
        name = tag.split(":")[0]
        if running & {tag, name, f"{name}:latest", str(folder)}:
            tags.setdefault(tag, "being served")
        if tag in tags:
            for model in bento.bento_models(bento.read_description(folder / bento.BENTO_FILE) or {}):
                tags.setdefault(model, f"served by {tag}")
    return tags


def _package_tags(text: bytes | None) -> list[str]:
    values = json.loads(text or b"{}")
    return [str(values[key]) for key in ("model_tag", "bento_tag") if key in values]


def _unused_tags(project: Project, tags: dict[str, str]) -> Iterator[Garbage]:
    for tag, folder in _store(project, "bentos").items():
        if tag not in tags:
            yield Garbage("bento", tag, _size(folder), folder)
    for tag, folder in _store(project, "models").items():
        if tag not in tags:
            yield Garbage("model", tag, _size(folder), folder)


def _store(project: Project, shelf: Literal["bentos", "models"]) -> dict[str, Path]:
    """Folders of this program's models or Bentos in BentoML's store, by tag."""
    file = bento.BENTO_FILE if shelf == "bentos" else bento.MODEL_FILE
    paths = sorted((bento.home(project) / shelf).glob(f"*/*/{file}"))
    return {
        f"{path.parent.parent.name}:{path.parent.name}": path.parent for path in paths if bento.read_description(path)
    }


def _running_words() -> set[str]:
    """All words of the command lines of this machine's processes, and the folders they run in."""
    import psutil

    words: set[str] = set()
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words |= {*(process.info["cmdline"] or ()), str(process.info["cwd"])}
    return words


def _bentoml(project: Project, arguments: list[str]) -> None:
    """Through BentoML, which keeps its own note of the latest version."""
    command = [sys.executable, "-m", "bentoml", *arguments]
    result = subprocess.run(command, env=bento.environment(project), capture_output=True, text=True, check=False)
    if result.returncode:
        raise RefragError(f"`bentoml {' '.join(arguments)}` failed:\n{(result.stdout + result.stderr)[-2000:]}")


def _delete_tables(folder: Path) -> None:
    """Renamed first: a folder of tables with its own name is taken for whole."""
    if not folder.name.startswith(REMOVED):
        folder = folder.rename(folder.with_name(f"{REMOVED}-{folder.name}"))
    shutil.rmtree(folder)


def _write_kept(folder: Path, plan: Plan) -> None:
    """A DVC project that names all that stays, for `dvc gc --projects`: DVC then expands and deletes by itself.

    Its own choice (the tags' and branches' dvc.yaml and params.yaml) would miss the artifacts of a model that
    params.yaml no longer names, and what they were made from.
    """
    (folder / ".dvc").mkdir()
    config = CONFIG.format(site=folder / "site", cache=plan.cache.folder)
    (folder / ".dvc" / "config").write_text(config, encoding="utf-8")
    outs = [
        {"md5": hash, "hash": "md5", "path": hash.removesuffix(FOLDER_MARK)}
        for hash in sorted(plan.kept)
        if plan.cache.listing(hash)
    ]
    (folder / "kept.dvc").write_text(yaml.safe_dump({"outs": outs}), encoding="utf-8")


def _size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
