"""One partition per model of params.yaml, as DVC's matrix has; and the project they belong to."""

import os
from pathlib import Path

import dagster as dg

from refrag_platform.project import Project


def find_project() -> Project:
    """The project of $REFRAG_ROOT, else the one this package lies in."""
    return Project.find(Path(os.environ.get("REFRAG_ROOT") or Path(__file__).parent))


MODELS = dg.StaticPartitionsDefinition(find_project().models())
