"""Hold an artifact's summary rows against its suite: one CheckResult per expectation.

`runner.run_stage` calls `check_once` before it publishes, the Dagster assets on what is published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.errors import ArtifactError
from refrag_platform.quality.docs import build_docs, new_context
from refrag_platform.quality.results import DOCS_FOLDER, CheckResult, read_results, subject, write_results
from refrag_platform.quality.suites import SUITES, Check
from refrag_platform.quality.summaries import SUMMARIES
from refrag_platform.quality.summaries.artifact import Artifact, SummaryRow
from refrag_platform.recipes import Recipe

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.core import ExpectationSuiteValidationResult
    from great_expectations.data_context import EphemeralDataContext

ROWS_SHOWN = 20


def check_once(recipe: Recipe, manifest: Manifest, folder: Path, inputs: dict[str, Path]) -> list[CheckResult]:
    """Check the artifact in `folder`, or repeat what was found the last time if nothing that decides it changed.

    Args:
        manifest: the artifact's; its hashes must be known to be those of the bytes in content/ and `inputs`.
        folder: holds content/; Data Docs and results.json land in checks/ beside it.
    """
    docs, of = folder / DOCS_FOLDER, subject(recipe, manifest)
    try:
        return read_results(docs, of)
    except ArtifactError:
        return check_artifact(manifest.stage, recipe, folder / "content", inputs, docs, of)


def check_artifact(
    stage: str, recipe: Recipe, content: Path, inputs: dict[str, Path], docs: Path | None = None, of: str | None = None
) -> list[CheckResult]:
    """Check the artifact of `stage` in `content`, made from the content folders `inputs`.

    A table that can't be read fails its checks, so damaged files are results, not exceptions. With `docs`,
    that folder is replaced by Data Docs and results.json, which names `of` as what the results are of.
    """
    artifact = Artifact(recipe, stage, content, inputs)
    context = new_context(docs)
    results: dict[str, CheckResult] = {}
    for table in dict.fromkeys(check.table for check in SUITES[stage]):
        checks = [check for check in SUITES[stage] if check.table == table]
        for result in _check_table(context, artifact, table, checks):
            results[result.name] = result
    ordered = [results[check.name] for check in SUITES[stage]]
    if docs is not None:
        build_docs(context, docs)
        write_results(docs, ordered, of)
    return ordered


def blocks(check: Check, recipe: Recipe) -> bool:
    """Whether a failure of `check` stops what is downstream."""
    return check.integrity or recipe.maturity == "released"


def _check_table(
    context: EphemeralDataContext, artifact: Artifact, table: str, checks: list[Check]
) -> list[CheckResult]:
    """The results of all checks over one table."""
    try:
        rows: list[SummaryRow] = getattr(SUMMARIES[artifact.stage], table)(artifact)
    except Exception as error:  # whatever reading a damaged file raises is the finding
        return [_unread(check, artifact.recipe, f"{type(error).__name__}: {error}") for check in checks]
    if not rows:
        return [_unread(check, artifact.recipe, f"there are no {table} to look at") for check in checks]
    import pandas as pd

    frame = pd.DataFrame(rows)
    outcome: Any = _validate(context, f"{artifact.stage}.{table}", frame, checks, artifact.recipe)
    # Great Expectations gives results in an order of its own.
    by_name = {result.expectation_config.meta["check"]: result for result in outcome.results}
    return [_result(check, artifact.recipe, frame, by_name[check.name]) for check in checks]


def _validate(
    context: EphemeralDataContext, name: str, frame: pd.DataFrame, checks: list[Check], recipe: Recipe
) -> ExpectationSuiteValidationResult:
    """Run one Great Expectations suite over one table."""
    import great_expectations as gx
    import great_expectations.expectations as gxe

    batch = (
        context.data_sources.add_pandas(name).add_dataframe_asset("summary").add_batch_definition_whole_dataframe("all")
    )
    suite = context.suites.add(gx.ExpectationSuite(name=name))
    for check in checks:
        expectation = getattr(gxe, check.expectation)
        severity = "critical" if blocks(check, recipe) else "warning"
        suite.add_expectation(
            expectation(**check.arguments, severity=severity, notes=check.says, meta={"check": check.name})
        )
    definition = gx.ValidationDefinition(name=name, data=batch, suite=suite)
    return context.validation_definitions.add(definition).run(
        batch_parameters={"dataframe": frame},
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["row"]},
    )


def _result(check: Check, recipe: Recipe, frame: pd.DataFrame, outcome: Any) -> CheckResult:
    """One expectation's outcome as a CheckResult whose message names the rows at fault."""
    # Great Expectations skips empty cells (NaN is one); here a missing figure is a failure.
    absent = frame[check.columns].isna().any(axis=1)
    indices = (outcome.result or {}).get("unexpected_index_list") or []
    faulty = frame["row"].isin([index["row"] for index in indices]) | absent
    passed = bool(outcome.success) and not absent.any()
    shown = frame if passed else frame[faulty] if faulty.any() else frame
    observed: dict[str, Any] = {}
    for row in json.loads(shown.head(ROWS_SHOWN).to_json(orient="records")):
        values = {column: row[column] for column in check.columns}
        observed[str(row["row"])] = values if len(values) > 1 else values[check.columns[0]]
    message = check.says if passed else _fault(check, recipe, observed)
    return CheckResult(check.name, passed, blocks(check, recipe), message, observed)


def _fault(check: Check, recipe: Recipe, observed: dict[str, Any]) -> str:
    """What was found against the rule, and whether the run goes on."""
    values = "; ".join(f"{row}: {_words(value)}" for row, value in observed.items())
    return f"{check.says}. Found {values}, but {check.columns[0]} must be {check.allowed}{_consequence(check, recipe)}"


def _consequence(check: Check, recipe: Recipe) -> str:
    return (
        "" if blocks(check, recipe) else ". The run goes on; it would end here if the recipe's maturity were released"
    )


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_number(part)}" for key, part in value.items())
    return _number(value)


def _number(value: Any) -> str:
    """A figure to five digits: more say nothing to a reader, and `observed` has them."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _unread(check: Check, recipe: Recipe, reason: str) -> CheckResult:
    """A check that could not be made counts as failed."""
    message = f"{check.says}. It can't be checked: {reason}{_consequence(check, recipe)}"
    return CheckResult(check.name, False, blocks(check, recipe), message)
