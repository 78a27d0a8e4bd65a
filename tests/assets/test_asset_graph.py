"""The asset graph is the pipeline: the same names, inputs, models and checks, loaded without a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime

import yaml
from dagster import AssetKey, DagsterInstance, build_schedule_context

from assets.definitions import defs
from assets.jobs import weekly
from refrag_platform.project import Project
from refrag_platform.quality.suites import SUITES
from refrag_platform.stages import STAGES
from tests.conftest import ROOT

GRAPH = defs.resolve_asset_graph()
SUNDAY = datetime(2030, 1, 6, 3, tzinfo=UTC)
SNAPSHOT = {
    "corpus": ("data", None),
    "reconstruction": ("training", "gpu"),
    "cpt": ("training", "gpu"),
    "chunks": ("data", "gpu"),
    "policy": ("training", "gpu"),
    "finetuned": ("training", "gpu"),
    "evaluation": ("release", "gpu"),
    "package": ("release", None),
}


def asset_inputs() -> dict[str, set[str]]:
    keys = GRAPH.get_all_asset_keys()
    return {key.to_user_string(): {parent.to_user_string() for parent in GRAPH.get(key).parent_keys} for key in keys}


def dvc_inputs() -> dict[str, set[str]]:
    """Which stages' outputs each stage of dvc.yaml depends on."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    made = {out: name for name, stage in stages.items() for entry in stage["outs"] for out in entry}
    return {name: {made[path] for path in stage["deps"] if path in made} for name, stage in stages.items()}


def test_the_assets_are_the_stages() -> None:
    assert asset_inputs() == {name: set(stage.inputs) for name, stage in STAGES.items()}


def test_the_asset_graph_is_the_graph_of_dvc_yaml() -> None:
    assert asset_inputs() == dvc_inputs()


def test_partitions_are_the_models_that_dvc_runs() -> None:
    for stage in STAGES:
        partitions = GRAPH.get(AssetKey(stage)).partitions_def
        assert partitions is not None
        assert partitions.get_partition_keys() == Project(ROOT).models()


def test_every_asset_has_its_group_pool_owner_kinds_and_words() -> None:
    for name, (group, pool) in SNAPSHOT.items():
        node = GRAPH.get(AssetKey(name))
        assert (node.group_name, node.pools) == (group, {pool} if pool else set())
        assert node.owners == ["team:refrag"]
        assert "dvc" in node.kinds and len(node.kinds) > 1
        assert node.description and ":" in node.description


def test_every_expectation_is_a_blocking_asset_check() -> None:
    for name, suite in SUITES.items():
        keys = GRAPH.get_check_keys_for_assets({AssetKey(name)})
        assert {key.name for key in keys} == {check.name for check in suite}
        assert all(GRAPH.get_check_spec(key).blocking for key in keys)


def test_the_schedule_runs_every_model_and_is_off() -> None:
    repository = defs.get_repository_def()
    with DagsterInstance.ephemeral() as instance:
        context = build_schedule_context(instance, scheduled_execution_time=SUNDAY, repository_def=repository)
        data = weekly.evaluate_tick(context)
    assert [request.partition_key for request in data.run_requests or []] == Project(ROOT).models()
    assert weekly.default_status.value == "STOPPED"


def test_the_code_location_loads_without_a_warning() -> None:
    script = "import warnings; warnings.simplefilter('always'); from assets.definitions import defs; "
    script += "defs.resolve_all_job_defs()"
    environment = {**os.environ, "DAGSTER_DISABLE_TELEMETRY": "1"}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "assets/" not in result.stderr
    assert "Warning" not in result.stderr
