"""manifest.json of packed weights: what is in the folder, what it was made of, by which trainings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refrag_platform.artifacts.digest import file_digest
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.artifacts.reports import MACHINE
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.recipes import Recipe

FORMAT = 1
MANIFEST = "manifest.json"
TRAINING = ("steps", "first_loss", "last_loss")
# Of the manifests of the stages that made them: what went in, down to the source files, how and where.
RECORDED = {"hash", "inputs", "sources", "seed", "code", "commit", "seconds", "hardware"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of packed weights, their files checked against it.

    Raises:
        ArtifactError: there is none, it is of another format, or a file is missing or not as it was written.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder} holds no packed weights: {MANIFEST} can't be read ({error})") from None
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{folder / MANIFEST} has format {manifest.get('format')!r}; this version reads {FORMAT}")
    for name, facts in manifest["files"].items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} is not whole: {name} is missing; get it again")
        if file_facts(folder / name) != facts:
            raise ArtifactError(f"{folder / name} is not the file that {MANIFEST} names; get it again")
    return manifest


class Earlier(NamedTuple):
    """Packed weights that a training went on from.

    folder, manifest: where what it left unchanged is taken from, and what is said of it there.
    record: what the manifest of the new ones says of them: `folder` and `hash` of their manifest.json, as the stages
    that read it recorded them, and what it said, `continues` too.
    """

    folder: Path
    manifest: dict[str, Any]
    record: dict[str, Any]


def earlier_weights(root: Path, place: str, digest: str) -> Earlier:
    """Those whose manifest.json, `place` in the project at `root`, had this MD5 when training began.

    Packed again over them, the new ones are there already, and say which these were.

    Raises:
        ArtifactError: others are there now, or none.
    """
    folder = (root / place).parent
    manifest = read_manifest(folder)
    if (now := file_digest(folder / MANIFEST)) == digest:
        said = {key: manifest[key] for key in ("model", "training", "stages", "data", "continues") if key in manifest}
        return Earlier(folder, manifest, {"folder": Path(place).parent.as_posix(), "hash": digest} | said)
    if (before := manifest.get("continues", {})).get("hash") == digest:
        return Earlier(folder, manifest, before)
    raise ArtifactError(
        f"training went on from {place} of hash {digest}, and {now} is there now; bring back what was there, by Git"
    )


def earlier_records(packed: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a manifest records of the packed weights that training went on from, the newest first."""
    while packed := packed.get("continues", {}):
        yield packed


def is_packed(folder: Path) -> bool:
    """Whether the folder holds packed weights, damaged or not."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "codings" in manifest


def named_sources(recipe: Recipe) -> list[str]:
    """What a recipe trains on, a line each."""
    named = [f"corpus: {source.kind}{f' {source.path}' if source.path else ''}" for source in recipe.corpus.sources]
    for kind in ("questions", "distractors", "summaries"):
        named += [f"fine-tuning, {kind}: {name}" for name in getattr(recipe.finetuned, kind)]
    return named


def figures_of(stages: Sequence[Manifest]) -> dict[str, dict[str, Any]]:
    """What the manifests of trainings say of them."""
    return {manifest.stage: training_figures(manifest.metrics) for manifest in stages if "steps" in manifest.metrics}


def training_figures(values: Mapping[str, Any]) -> dict[str, Any]:
    """Steps and losses of a training, from a run's summary, an artifact's training.json or a manifest's metrics.

    Raises:
        RefragError: one is missing.
    """
    if missing := [key for key in TRAINING if key not in values]:
        raise RefragError(
            f"the figures of a training have no {', '.join(missing)}; give a summary.json or training.json"
        )
    # A manifest's metrics have the last step's beside the others.
    last = values.get("last", {key: value for key, value in values.items() if key not in TRAINING})
    last = {key: value for key, value in last.items() if key not in MACHINE}
    return {key: values[key] for key in TRAINING} | {"last": last}


def file_facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
