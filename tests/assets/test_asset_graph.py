"""The asset graph is the pipeline: the same names, inputs, models and checks, loaded without a warning."""

import os
import re
import subprocess
import sys
from datetime import timedelta

import yaml
from dagster import AssetKey
from dagster._core.definitions.freshness import TimeWindowFreshnessPolicy

from assets.definitions import defs
from assets.settings import retraining_settings
from refrag_platform.history.pipeline import RECIPE
from refrag_platform.project import Project
from refrag_platform.quality.suites import SUITES
from refrag_platform.stages import STAGES
from tests.conftest import ROOT

GRAPH = defs.resolve_asset_graph()
ON_THE_DEVICE = {"reconstruction", "cpt", "chunks", "policy", "finetuned", "evaluation", "released"}
# What releases a model is no stage: it makes no bytes, and Git's tags hold what it decides.
NO_STAGES = {"released": {"package"}}


def asset_inputs() -> dict[str, set[str]]:
    keys = GRAPH.get_all_asset_keys()
    return {key.to_user_string(): {parent.to_user_string() for parent in GRAPH.get(key).parent_keys} for key in keys}


def dvc_inputs() -> dict[str, set[str]]:
    """Which stages' outputs each stage of dvc.yaml depends on; the recipe that DVC resolves first is no artifact."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    del stages[RECIPE]
    made = {out: name for name, stage in stages.items() for entry in stage["outs"] for out in entry}
    return {name: {made[path] for path in stage["deps"] if path in made} for name, stage in stages.items()}


def test_the_assets_are_the_stages() -> None:
    assert asset_inputs() == {name: set(stage.inputs) for name, stage in STAGES.items()} | NO_STAGES


def test_the_asset_graph_is_the_graph_of_dvc_yaml_and_the_release_after_it() -> None:
    assert asset_inputs() == dvc_inputs() | NO_STAGES
    assert not NO_STAGES.keys() & dvc_inputs().keys()


def test_partitions_are_the_models_that_dvc_runs() -> None:
    for stage in (*STAGES, *NO_STAGES):
        partitions = GRAPH.get(AssetKey(stage)).partitions_def
        assert partitions is not None
        assert partitions.get_partition_keys() == Project(ROOT).models()


def test_every_asset_has_its_group_pool_owner_kinds_and_words() -> None:
    for name in (*STAGES, *NO_STAGES):
        node = GRAPH.get(AssetKey(name))
        assert (node.group_name, node.pools) == ("refrag", {"gpu"} if name in ON_THE_DEVICE else set())
        assert node.owners == ["team:refrag"]
        assert "dvc" in node.kinds and len(node.kinds) > 1
        assert node.description and ":" in node.description


def test_every_expectation_is_an_asset_check_that_is_called_blocking_where_it_always_is() -> None:
    for name, suite in SUITES.items():
        keys = GRAPH.get_check_keys_for_assets({AssetKey(name)})
        assert {key.name for key in keys} == {check.name for check in suite}
        specs = {key.name: GRAPH.get_check_spec(key) for key in keys}
        assert {name: spec.blocking for name, spec in specs.items()} == {check.name: check.integrity for check in suite}
        # A description stands beside "Failed" as well: it is a rule, which stays true.
        rules = [spec.description or "" for spec in specs.values()]
        assert [rule for rule in rules if not re.search(r"\b(must|may)\b", rule)] == []
    assert {key.name for key in GRAPH.get_check_keys_for_assets({AssetKey("released")})} == {"gate"}


def test_the_pipeline_is_the_stages_and_retraining_releases_too() -> None:
    jobs = {
        name: defs.resolve_job_def(name).asset_layer.executable_asset_keys for name in ("refrag_pipeline", "retraining")
    }
    assert jobs["refrag_pipeline"] == {AssetKey(stage) for stage in STAGES}
    assert jobs["retraining"] == {AssetKey(name) for name in (*STAGES, *NO_STAGES)}


def test_a_release_that_is_older_than_the_settings_allow_is_overdue() -> None:
    policy = GRAPH.get(AssetKey("released")).freshness_policy
    assert isinstance(policy, TimeWindowFreshnessPolicy)
    assert policy.fail_window.to_timedelta() == timedelta(days=retraining_settings(Project(ROOT)).fresh_days)


def test_the_code_location_loads_without_a_warning() -> None:
    script = "import warnings; warnings.simplefilter('always'); from assets.definitions import defs; "
    script += "defs.resolve_all_job_defs()"
    environment = {**os.environ, "DAGSTER_DISABLE_TELEMETRY": "1"}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "assets/" not in result.stderr
    assert "Warning" not in result.stderr
