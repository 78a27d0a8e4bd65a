"""Weights from outside that no manifest accounts for, and the artifacts that have them in them.

models/NAME/release comes with the repository, `cpt.teacher` from wherever the recipe says. What they were trained on
can't be looked up as documents; a release's manifest.json says it in words.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from refrag_platform.artifacts.digest import file_digest
from refrag_platform.artifacts.manifest import FILE_NAME
from refrag_platform.lineage.graph import IN_PLACE, Graph, Version
from refrag_platform.project import Project
from refrag_platform.stages import SHIPPED

RELEASE = re.compile(rf"(.*/{SHIPPED})/{re.escape(FILE_NAME)}")
# What the digest of a folder ends with.
FOLDER = ".dir"


@dataclass(frozen=True)
class Weights:
    """Weights of which nobody here knows every document.

    `kind`: what they are to the artifacts `made` with them, all of them in place, in the order in which they are made.
    `data`: what their manifest says that they were trained on; None where it can't be read any more, or there is none.
    """

    kind: str
    path: str
    data: list[str] | None
    made: list[Version]
    models: list[str]

    @property
    def why(self) -> str:
        """Why these artifacts are unclear."""
        return f"{'started' if self.kind == SHIPPED else 'learned'} from {self.path}"

    @property
    def training(self) -> str:
        """What is known of the documents behind them, as a sentence."""
        if self.kind != SHIPPED:
            return f"{self.path} is a teacher; no record here says what it was trained on."
        if self.data is None:
            return (
                f"These weights are no longer in {self.path}; what they were trained on stands in an earlier "
                f"{FILE_NAME} of it (git log -- {self.path})."
            )
        manifest = f"{self.path}/{FILE_NAME}"
        if not self.data:
            return f"{manifest} does not say what these weights were trained on."
        return "\n".join([f"What these weights were trained on, as {manifest} says:", *map("  - {}".format, self.data)])

    @property
    def remedy(self) -> str:
        """What to do if a document may be among those."""
        key, scratch, other = "cpt.teacher", "", ""
        if self.kind == SHIPPED:
            key, scratch = f"continue_from: {SHIPPED}", ", which trains from scratch"
            other = "; or pack weights that were trained without it (`refrag weights pack --replace`) and run that"
        overrides = " and ".join(f"overrides.{model}" for model in self.models)
        runs = " and ".join(f"`refrag run all --model {model}`" for model in self.models)
        return (
            f"If the document may be behind them, making the artifacts again is not enough: take {key} out of "
            f"{overrides} in params.yaml, or out of the recipe, and run {runs}{scratch}{other}."
        )


def unrecorded_weights(project: Project, graph: Graph, model: str | None = None) -> list[Weights]:
    """All weights from outside that artifacts in place were made with, each with these artifacts.

    Args:
        model: look at this model's artifacts only.
    """
    made: dict[Version, set[Version]] = {}
    for version, facts in graph.versions.items():
        for origin in facts.made_from or ():
            if origin.kind == "source" and (RELEASE.fullmatch(origin.name) or _is_teacher(origin, version)):
                made.setdefault(origin, set()).add(version)
    found = []
    for origin, first in sorted(made.items()):
        release = RELEASE.fullmatch(origin.name)
        here = [
            version
            for layer in graph.after(first).layers()
            for version in layer
            if IN_PLACE in graph.versions[version].places and model in {None, graph.versions[version].model}
        ]
        if here:
            kind, path = (SHIPPED, release[1]) if release else ("teacher", origin.name)
            models = sorted({graph.versions[version].model for version in here})
            found.append(Weights(kind, path, _data(project, origin) if release else None, here, models))
    return found


def _is_teacher(origin: Version, made: Version) -> bool:
    """Whether a source is the folder that CPT learned from; the one that an evaluation reads is only measured."""
    return origin.hash.endswith(FOLDER) and made.name.endswith("/cpt")


def _data(project: Project, manifest: Version) -> list[str] | None:
    """What a release's manifest.json says of its data; None if the one in place is of another release."""
    path = project.root / Path(manifest.name)
    try:
        if file_digest(path) != manifest.hash:
            return None
        data = json.loads(path.read_text(encoding="utf-8")).get("data")
        return [str(line) for line in data] if isinstance(data, list) else []
    except (OSError, ValueError, AttributeError):
        return None
