"""A pipeline of planted stage functions: real runner, real DVC and Git, content that is made in no time."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from refrag_platform import runner
from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import InputRecord
from refrag_platform.corpus import sources
from refrag_platform.history.pipeline import RECIPE, write_resolved
from refrag_platform.project import Project
from refrag_platform.stages import STAGES, StageContext

MODEL = "tiny"
# Of the Factbook's installed package, whose many files no test changes.
once_for_each = cache(folder_digest)


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage writes what it was given: its inputs' hashes, its settings, the sources' bytes."""
    monkeypatch.setattr(runner, "stage_function", lambda stage: planted)
    monkeypatch.setattr(runner, "_check", lambda manifest, context, work: None)
    monkeypatch.setattr(sources, "folder_digest", once_for_each)


def planted(context: StageContext) -> dict[str, Any]:
    """A stage function whose content depends on all that a real one's does."""
    facts = [f"{name} {folder_digest(folder)}" for name, folder in sorted(context.inputs.items())]
    facts += [str(context.recipe.section(name)) for name in STAGES[context.stage].sections]
    if context.stage == "corpus":
        for file in sorted(context.project.source_dir(context.recipe.name).glob("*.txt")):
            facts.append(file.read_text())
            context.sources.append(InputRecord.of(context.project.root, file, file.name))
    nested = context.out / "train" / "tokens-00000.bin"
    nested.parent.mkdir()
    nested.write_text("\n".join(facts))
    (context.out / "train.json").write_text(context.stage)
    lines = [{"step": step, "loss": 3.5 - step, "learning_rate_decoder": 0.1 * step} for step in (1, 2)]
    (context.beside / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"loss": 1.5, "stage": context.stage}


def make_all(project: Project, model: str = MODEL) -> dict[str, str]:
    """Run every stage; return the hashes."""
    return {stage: runner.run_stage(project, stage, model).manifest.hash for stage in STAGES}


def override(project: Project, section: str, values: dict[str, Any], model: str = MODEL) -> None:
    """Set a section of a model's overrides in params.yaml."""
    params = project.params()
    params["overrides"][model][section] = values
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))


def record_all(project: Project, *stages: str, model: str = MODEL) -> None:
    """What `dvc.record` does, for all stages (or these) at once."""
    write_resolved(project, model)
    names = (RECIPE, *(stages or STAGES))
    run(project.root, "dvc", "commit", "--force", *(f"{stage}@{model}" for stage in names))


def run(folder: Path, *command: str) -> str:
    """Run a program of the test's environment in `folder` and return what it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
