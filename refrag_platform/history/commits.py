"""What Git remembers of artifacts: manifests and dvc.lock at a commit, and which commits must be kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml
from pydantic import ValidationError

from refrag_platform.artifacts.manifest import FILE_NAME, Manifest
from refrag_platform.errors import RefragError
from refrag_platform.history.dvc import LOCK_FILE
from refrag_platform.history.git import Git
from refrag_platform.project import Project

RUNS = "refs/heads/runs/"
# An annotated tag stands for the commit it is on.
REF_FORMAT = "%(refname) " + " ".join(
    f"%(if)%(*{fact})%(then)%(*{fact})%(else)%({fact})%(end)" for fact in ("objecttype", "objectname")
)
MANIFESTS = f":(glob)*/*/*/{FILE_NAME}"


@dataclass(frozen=True)
class Kept:
    """A commit whose artifacts stay. `model`: those of one model only; `why` names the tag or branch."""

    commit: str
    model: str | None
    why: str


def kept_commits(project: Project, last: int) -> list[Kept]:
    """Tagged commits, the last `last` recorded on each runs/NAME, and the tips of all other branches.

    A release's tag (MODEL@vX, MODEL#prod#N) keeps that model's artifacts, any other tag and DVC's experiments
    all that their dvc.lock names.
    """
    git, kept = Git(project.root), []
    for ref, commit in _refs(git, "refs/tags", "refs/heads", "refs/exps"):
        if ref.startswith(RUNS):
            model = ref.removeprefix(RUNS)
            runs = git.run("log", "--format=%H", f"--max-count={last}", commit, "--", LOCK_FILE).split() if last else []
            kept += [Kept(run, model, f"runs/{model} {run[:10]}") for run in runs]
        elif ref.startswith("refs/tags/"):
            name = ref.removeprefix("refs/tags/")
            release = re.match(r"([^@#]+)(@v|#)", name)
            kept.append(Kept(commit, release[1] if release else None, name))
        else:
            kept.append(Kept(commit, None, ref.removeprefix("refs/heads/")))
    if head := git.revision("HEAD"):  # no branch may be checked out
        kept.append(Kept(head, None, "HEAD"))
    return kept


def locked_hashes(text: str, model: str | None = None) -> dict[str, str]:
    """Path by hash of the folders that a dvc.lock names, outputs and dependencies.

    Args:
        model: only of this model's stages, if the file has any.

    Raises:
        RefragError: it can't be read.
    """
    try:
        stages = (yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}).get("stages", {})
    except yaml.YAMLError as error:
        raise RefragError(f"a {LOCK_FILE} can't be read ({str(error).splitlines()[0]}); restore it from Git") from None
    of_model = {name: stage for name, stage in stages.items() if name.endswith(f"@{model}")}
    entries = [
        entry for stage in (of_model or stages).values() for kind in ("deps", "outs") for entry in stage.get(kind, [])
    ]
    return {entry["md5"]: entry["path"] for entry in entries if entry.get("md5", "").endswith(".dir")}


def file_at(project: Project, commit: str, path: str) -> str | None:
    """The text of a file, given relative to the project, at a commit; None if it is not there.

    Raises:
        RefragError: Git can't read the commit, which is another thing than its having no such file.
    """
    git = Git(project.root)
    entry = git.run("ls-tree", commit, "--", path)
    return git.run("cat-file", "blob", entry.split()[2]) if entry else None


def manifests_at(project: Project, commit: str) -> dict[str, Manifest]:
    """Every readable manifest at a commit, by its artifact's folder."""
    git, manifests = Git(project.root), {}
    for line in git.run("ls-tree", "-r", commit, "--", "models", "data").splitlines():
        (_, _, blob), path = line.split("\t")[0].split(" "), line.split("\t")[1]
        if path.endswith(f"/{FILE_NAME}") and path.count("/") == 3 and (manifest := _manifest(git, blob)):
            manifests[path.removesuffix(f"/{FILE_NAME}")] = manifest
    return manifests


def recorded_manifests(project: Project) -> Iterator[tuple[str, str, Manifest]]:
    """Every manifest ever committed on runs/NAME or under a tag: where it was first, its folder, itself.

    Nothing outside a Git repository.
    """
    git = Git(project.root)
    # Runs are merges of the run before and the code: what is new against the former is this run's.
    form = ["--format=%H", "--raw", "--no-abbrev", "--no-renames", "--relative", "--diff-merges=first-parent"]
    refs = ["--branches=runs/*", "--remotes=*/runs/*", "--tags"]
    blobs: dict[str, Manifest | None] = {}
    commit = ""
    for line in git.run("log", *form, *refs, "--", MANIFESTS, check=False).splitlines():
        if not line.startswith(":"):
            commit = line or commit
            continue
        fields, path = line.split("\t")
        blob, status = fields.split(" ")[3:5]
        if status != "D":
            if blob not in blobs:
                blobs[blob] = _manifest(git, blob)
            if manifest := blobs[blob]:
                yield commit, path.removesuffix(f"/{FILE_NAME}"), manifest


def tags(project: Project) -> dict[str, list[str]]:
    """Names of all tags by the commit they are on; nothing outside a Git repository."""
    names: dict[str, list[str]] = {}
    for ref, commit in _refs(Git(project.root), "refs/tags", check=False):
        names.setdefault(commit, []).append(ref.removeprefix("refs/tags/"))
    return names


def _refs(git: Git, *patterns: str, check: bool = True) -> Iterator[tuple[str, str]]:
    """Name and commit of every ref that stands for one."""
    for line in git.run("for-each-ref", f"--format={REF_FORMAT}", *patterns, check=check).splitlines():
        ref, kind, commit = line.split(" ")
        if kind == "commit":
            yield ref, commit


def _manifest(git: Git, blob: str) -> Manifest | None:
    try:
        return Manifest.model_validate_json(git.run("cat-file", "blob", blob))
    except (ValidationError, RefragError):  # of another version of this program
        return None
