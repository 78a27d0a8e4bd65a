"""Asset checks: one per expectation of the artifact's suite; those that block stop what is downstream."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dagster import AssetCheckResult, AssetCheckSeverity, AssetCheckSpec, MetadataValue

from refrag_platform.project import Project
from refrag_platform.quality.suites import SUITES
from refrag_platform.stages import STAGES

DOCS_FOLDER = "checks"


def check_specs(stage: str) -> list[AssetCheckSpec]:
    """Declarations for the UI.

    All are blocking; a quality threshold of an undertrained recipe fails as a warning, which blocks nothing.
    """
    return [AssetCheckSpec(check.name, asset=stage, description=check.says, blocking=True) for check in SUITES[stage]]


def run_checks(project: Project, stage: str, model: str, folder: Path) -> list[AssetCheckResult]:
    """Check the artifact in `folder` (published, or kept after a failure); Data Docs land beside it."""
    from refrag_platform.quality.checks import check_artifact

    inputs = {name: project.content(name, model) for name in STAGES[stage].inputs}
    docs = folder / DOCS_FOLDER
    results = check_artifact(stage, project.recipe(model), folder / "content", inputs, docs)
    return [
        AssetCheckResult(
            check_name=result.name,
            asset_key=stage,
            passed=result.passed,
            severity=AssetCheckSeverity.ERROR if result.blocking else AssetCheckSeverity.WARN,
            description=result.message,
            metadata={
                "observed": MetadataValue.json(result.observed),
                "data_docs": MetadataValue.path(docs / "index.html"),
            },
        )
        for result in results
    ]


def blocking_failures(results: Iterable[AssetCheckResult]) -> list[str]:
    """Name and message of every failed check that stops what is downstream."""
    return [
        f"{result.check_name}: {result.description}"
        for result in results
        if not result.passed and result.severity is AssetCheckSeverity.ERROR
    ]
