"""Two versions side by side: settings, data, code, metrics, evaluation. Run: `refrag diff A B`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import FILE_NAME, Manifest
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.history import commits
from refrag_platform.history.cache import Cache
from refrag_platform.history.git import Git
from refrag_platform.history.runs import branch
from refrag_platform.lineage.lineage import artifact_folder, trace
from refrag_platform.project import Project
from refrag_platform.stages import STAGES

EVALUATION_FILES = ("perplexity.json", "rag.json")
# What names a row of an evaluation; the rest are figures.
ROW_NAMES = ("system", "tuned", "k", "share_kept", "passages")


@dataclass(frozen=True)
class Side:
    """One of the two: what it was called, and the manifests of its chain by stage."""

    name: str
    manifests: dict[str, Manifest]


@dataclass(frozen=True)
class Difference:
    """One fact of both sides; None where a side has no such fact."""

    part: str
    name: str
    a: Any
    b: Any

    @property
    def differs(self) -> bool:
        return bool(self.a != self.b)


def side(project: Project, name: str, model: str | None = None) -> Side:
    """What `name` stands for.

    Args:
        name: an artifact's folder: it, all that it was made from, and the evaluation of just that. Or a
            commit, tag, branch or model: all artifacts of the run; of a model without a branch, those in place.
        model: whose artifacts, where a commit holds those of several.

    Raises:
        ArtifactError: there is no artifact under that name, or its chain is broken.
        RefragError: the name stands for nothing, or for several models.
    """
    path = Path(name)
    if (artifact_folder(path) / FILE_NAME).is_file():
        return Side(name, _chain(project, path))
    git = Git(project.root)
    if name in project.recipes() and git.revision(branch(name)) is None:
        manifests = {
            stage: Manifest.read(project.stage_dir(stage, name))
            for stage in STAGES
            if (project.stage_dir(stage, name) / FILE_NAME).is_file()
        }
        if not manifests:
            raise ArtifactError(f"{name} has no artifact; `refrag run all --model {name}` makes them")
        return Side(name, manifests)
    known = branch(name) if name in project.recipes() else name
    commit = git.revision(known)
    if commit is None:
        raise RefragError(
            f"{name} is neither an artifact's folder nor a commit, tag, branch or model; see `git log`. "
            "`refrag commit --model NAME` records a run on runs/NAME"
        )
    recorded = list(commits.manifests_at(project, commit).values())
    models = sorted({manifest.model for manifest in recorded})
    wanted = model or (name if name in models else None) or (models[0] if len(models) == 1 else None)
    if wanted is None:
        raise RefragError(
            f"{name} holds artifacts of {', '.join(models)}; say which with --model"
            if models
            else f"{name} (commit {commit[:10]}) holds no artifact; `refrag commit` records them on runs/NAME"
        )
    manifests = {manifest.stage: manifest for manifest in recorded if manifest.model == wanted}
    if not manifests:
        raise ArtifactError(f"{name} (commit {commit[:10]}) holds no artifact of {wanted}, only of {', '.join(models)}")
    return Side(name, {stage: manifests[stage] for stage in STAGES if stage in manifests})


def compare(project: Project, a: Side, b: Side) -> list[Difference]:
    """Every fact of both sides, part by part; equal ones too."""
    # Asked only where it is needed: that takes half a second.
    cached = cache(lambda: Cache.of(project))
    facts = [_facts(project, side, cached) for side in (a, b)]
    parts = list(dict.fromkeys(part for of_side in facts for part in of_side))
    rows = []
    for part in parts:
        left, right = (of_side.get(part, {}) for of_side in facts)
        names = list(dict.fromkeys([*left, *right]))
        rows += [Difference(part, name, left.get(name), right.get(name)) for name in names]
    return rows


def _chain(project: Project, path: Path) -> dict[str, Manifest]:
    """An artifact, all behind it, and the evaluation of just that artifact."""
    root = trace(project, path)
    manifests = {node.manifest.stage: node.manifest for node in root.walk()}
    try:
        evaluation = Manifest.read(project.stage_dir("evaluation", root.manifest.model))
    except ArtifactError:
        evaluation = None
    if evaluation is not None:
        judged = evaluation.inputs.get(root.manifest.stage)
        if judged is not None and judged.hash == root.manifest.hash:
            manifests["evaluation"] = evaluation
    return {stage: manifests[stage] for stage in STAGES if stage in manifests}


def _facts(project: Project, side: Side, cached: Callable[[], Cache]) -> dict[str, dict[str, Any]]:
    manifests = side.manifests
    facts: dict[str, dict[str, Any]] = {
        "artifacts": {stage: manifest.hash for stage, manifest in manifests.items()},
        "settings": _settings(manifests),
        "data": {source.path: source.hash for manifest in manifests.values() for source in manifest.sources},
        "code": {stage: manifest.code for stage, manifest in manifests.items()},
        "commit": {stage: manifest.commit for stage, manifest in manifests.items()},
        "libraries": {name: version for manifest in manifests.values() for name, version in manifest.libraries.items()},
        "metrics": {
            f"{stage}.{name}": value for stage, manifest in manifests.items() for name, value in flat(manifest.metrics)
        },
    }
    if "evaluation" in manifests:
        facts["evaluation"] = dict(_evaluation(project, manifests["evaluation"], cached))
    return facts


def _settings(manifests: dict[str, Manifest]) -> dict[str, Any]:
    """Settings by key; where stages were made with different values of one, a row for each stage."""
    values: dict[str, dict[str, Any]] = {}
    for stage, manifest in manifests.items():
        for name, value in flat({**manifest.settings, "seed": manifest.seed}):
            values.setdefault(name, {})[stage] = value
    settings: dict[str, Any] = {}
    for name, by_stage in values.items():
        first = next(iter(by_stage.values()))
        if all(value == first for value in by_stage.values()):
            settings[name] = first
        else:
            settings |= {f"{name} ({stage})": value for stage, value in by_stage.items()}
    return settings


def _evaluation(project: Project, manifest: Manifest, cached: Callable[[], Cache]) -> Iterator[tuple[str, Any]]:
    """Every figure of every row of an evaluation's tables, from its place or from DVC's cache."""
    content = project.content(manifest.stage, manifest.model)
    in_place = content.is_dir() and folder_digest(content) == manifest.hash
    for name in EVALUATION_FILES:
        path = content / name
        text = (path.read_bytes() if path.is_file() else None) if in_place else cached().read(manifest.hash, name)
        values = json.loads(text or b"{}")
        retrieval = values.get("retrieval", {})
        for row in retrieval.get("lookups", []):
            yield from ((f"retrieval {row['kind']} {key}", value) for key, value in row.items() if key != "kind")
        parts = [(Path(name).stem, row) for row in values.get("rows", [])]
        for part, row in [*parts, *(("retrieval", row) for row in retrieval.get("rows", []))]:
            # Of answers `tuned` once said another thing of the same row; `decoder` says it now, as a figure does.
            told = [key for key in ROW_NAMES[1:] if key != "tuned" or name != "rag.json"]
            label = " ".join(f"{key}={row[key]}" for key in told if row.get(key) is not None)
            for key, value in row.items():
                if key not in ROW_NAMES and value is not None:
                    yield f"{part} {row['system']} {label} {key}", value


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys joined by dots; lists stay whole."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
