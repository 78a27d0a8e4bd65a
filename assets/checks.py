"""Asset checks: one per expectation of the artifact's suite; those that block stop what is downstream."""

from collections.abc import Iterable
from pathlib import Path

import dagster as dg

from assets.metadata import docs_links
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.project import Project
from refrag_platform.quality.results import DOCS_FOLDER, CheckResult, read_results
from refrag_platform.quality.suites import SUITES
from refrag_platform.stages import STAGES

# What a failure of a quality threshold means.
QUALITY = "else the run goes on with a warning, or ends if the recipe's maturity is released"


def check_specs(stage: str) -> list[dg.AssetCheckSpec]:
    """Declarations for the UI.

    One declaration serves all models, and whether a quality threshold blocks is a model's own affair: only what blocks
    for each of them is called blocking. Of the others the description says it, and the run ends by itself
    (`blocking_failures`) where one fails that blocks.
    """
    return [
        dg.AssetCheckSpec(
            check.name,
            asset=stage,
            description=check.says if check.integrity else f"{check.says}; {QUALITY}",
            blocking=check.integrity,
        )
        for check in SUITES[stage]
    ]


def run_checks(project: Project, manifest: Manifest) -> list[dg.AssetCheckResult]:
    """The checks of the artifact in place, made now or, where nothing changed since, before; its bytes are its own."""
    from refrag_platform.quality.checks import check_once

    folder = project.stage_dir(manifest.stage, manifest.model)
    inputs = {name: project.content(name, manifest.model) for name in STAGES[manifest.stage].inputs}
    results = check_once(project.recipe(manifest.model), manifest, folder, inputs)
    return _as_dagster(project, manifest.stage, results, folder)


def kept_checks(project: Project, stage: str, folder: Path) -> list[dg.AssetCheckResult]:
    """What the runner found in an artifact that it set aside in `folder`."""
    return _as_dagster(project, stage, read_results(folder / DOCS_FOLDER), folder)


def _as_dagster(project: Project, stage: str, results: list[CheckResult], folder: Path) -> list[dg.AssetCheckResult]:
    return [
        dg.AssetCheckResult(
            check_name=result.name,
            asset_key=stage,
            passed=result.passed,
            severity=dg.AssetCheckSeverity.ERROR if result.blocking else dg.AssetCheckSeverity.WARN,
            description=result.message,
            metadata={"observed": dg.MetadataValue.json(result.observed), **docs_links(project, folder)},
        )
        for result in results
    ]


def blocking_failures(results: Iterable[dg.AssetCheckResult]) -> list[str]:
    """Name and message of every failed check that stops what is downstream."""
    return [
        f"{result.check_name}: {result.description}"
        for result in results
        if not result.passed and result.severity is dg.AssetCheckSeverity.ERROR
    ]
