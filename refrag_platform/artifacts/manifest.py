"""manifest.json beside every artifact: what it is, what it was made from, how, where, with which result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from refrag_platform.artifacts.digest import file_digest, folder_digest
from refrag_platform.errors import ArtifactError
from refrag_platform.files import write_text
from refrag_platform.names import name_text
from refrag_platform.project import Project

FILE_NAME = "manifest.json"
LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "pyarrow",
    "lancedb",
    "deepspeed",
    "bentoml",
)


class InputRecord(BaseModel):
    """One artifact or source file that went in."""

    path: str = Field(
        description="relative to the project's root, or as given when it lies outside; as names.py writes them"
    )
    hash: str

    @classmethod
    def of(cls, root: Path, file: Path, named: str) -> InputRecord:
        """The record of a file that a recipe names `named`; `root` is the project's.

        A file that a link in the project leads to goes by the name that it has there.
        """
        lies, resolved, base = Path(os.path.normpath(file)), file.resolve(), root.resolve()
        inside = next((path for path in (lies, resolved) if path.is_relative_to(base)), None)
        name = name_text(named if inside is None else inside.relative_to(base))
        return cls(path=name, hash=file_digest(file))


class Manifest(BaseModel):
    """The record of one artifact."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    model: str
    hash: str = Field(description="DVC's hash of content/")
    fingerprint: str = Field(description="hash over inputs, settings, seed, code: equal means nothing to do")
    inputs: dict[str, InputRecord] = Field(default_factory=dict)
    sources: list[InputRecord] = Field(default_factory=list, description="files from outside the pipeline")
    settings: dict[str, Any]
    seed: int
    code: str = Field(description="hash over the source files that the stage uses")
    commit: str = Field(description="Git commit, with + when the tree had changes; empty outside Git")
    started: str
    finished: str
    seconds: float
    hardware: dict[str, Any]
    libraries: dict[str, str]
    metrics: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write atomically into `folder`."""
        write_text(folder / FILE_NAME, self.model_dump_json(indent=2) + "\n")

    def describes(self, folder: Path) -> bool:
        """Whether the bytes of the content beside it in `folder` are those that it names; all of them are read."""
        return folder_digest(folder / "content") == self.hash

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in `folder`.

        Raises:
            ArtifactError: there is none, or it can't be read.
        """
        path = folder / FILE_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ArtifactError(f"no {FILE_NAME} in {folder}: it is not a finished artifact") from None
        except OSError as error:
            raise ArtifactError(f"{path} can't be read ({error.strerror}); mend that, or run the stage again") from None
        except ValidationError as error:
            raise ArtifactError(f"{path} is damaged ({error.error_count()} faults); run the stage again") from None


def published(project: Project, stage: str, model: str) -> Manifest | None:
    """The manifest of the artifact in place; None when there is none or its bytes are not the manifest's."""
    folder = project.stage_dir(stage, model)
    try:
        manifest = Manifest.read(folder)
    except ArtifactError:
        return None
    return manifest if manifest.describes(folder) else None


def now() -> str:
    """UTC time in ISO form."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def hardware() -> dict[str, Any]:
    """Processor, cores and GPUs of this machine."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "python": platform.python_version(),
    }


def libraries() -> dict[str, str]:
    """Installed versions of the libraries that shape an artifact."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
