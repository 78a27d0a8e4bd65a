"""A model and a Bento in BentoML's store, as the package stage puts them there, in no time."""

import json
from pathlib import Path

import bentoml
import pytest
import yaml

from refrag_platform import runner
from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.project import Project
from refrag_platform.serving import bento
from refrag_platform.serving.package import lineage
from refrag_platform.stages import StageContext
from tests.planted import planted

LABELS = {"project": "refrag-platform"}


def plant_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted package stage makes a model and a Bento, too, and names them as the real one does."""
    monkeypatch.delenv("BENTOML_HOME", raising=False)

    def made(context: StageContext) -> dict[str, object]:
        metrics = planted(context)
        return metrics if context.stage != "package" else {**metrics, **_package(context)}

    monkeypatch.setattr(runner, "stage_function", lambda stage: made)


def _package(context: StageContext) -> dict[str, str]:
    hashes = {name: folder_digest(path) for name, path in context.inputs.items()}
    version = folder_digest(context.out)[:16]
    tags = {kind: f"refrag-{context.recipe.name}:{version}" for kind in ("model_tag", "bento_tag")}
    labels = {**LABELS, "recipe": context.recipe.name}
    if not bento.store_path(context.project, "models", tags["model_tag"]).exists():
        metadata = {"hashes": hashes, "lineage": lineage(context)}
        store = bento.model_store(context.project)
        with bentoml.models.create(tags["model_tag"], labels=labels, metadata=metadata, _model_store=store) as model:
            (Path(model.path) / "weights").write_text("weights")
        plant_bento(context.project, tags["bento_tag"], tags["model_tag"])
    (context.out / bento.PACKAGE_FILE).write_text(json.dumps(tags))
    return tags


def plant_bento(project: Project, tag: str, model_tag: str) -> Path:
    """The files of a Bento that BentoML's store looks at."""
    folder = bento.store_path(project, "bentos", tag)
    (folder / "src").mkdir(parents=True)
    name, version = tag.split(":")
    created = "2026-01-01T00:00:00+00:00"
    description = {
        "service": "refrag_platform.serving.service:RefragService",
        "name": name,
        "version": version,
        "bentoml_version": bentoml.__version__,
        "creation_time": created,
        "labels": LABELS,
        "models": [],
        "entry_service": "refrag",
        "services": [
            {
                "name": "refrag",
                "service": "",
                "models": [{"tag": model_tag, "module": "", "creation_time": created}],
                "dependencies": [],
                "config": {},
            }
        ],
        "envs": [],
        "schema": {"name": "refrag", "type": "service", "routes": []},
        "spec": 2,
    }
    (folder / "bento.yaml").write_text(yaml.safe_dump(description))
    return folder
