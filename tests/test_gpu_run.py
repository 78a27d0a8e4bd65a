"""scripts/gpu_run.py: runs that stop and go on, low-rank updates that go on from run to run, scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel
from tests.conftest import ROOT, load_script
from tests.training.conftest import repeating_documents, write_corpus

SMALL = {
    "steps": 6, "batch_size": 2, "context_tokens": 16, "output_tokens": 8, "curriculum": "null", "packed": "true",
    "lora_rank": 2, "decoder_learning_rate": 0.01, "log_every": 1,
}  # fmt: skip


@pytest.fixture
def gpu_run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(monkeypatch, "gpu_run")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The tiny recipe with a small corpus, as `gpu_pieces.py assemble` leaves it."""
    base = Path(shutil.copytree(ROOT / "models" / "tiny", tmp_path / "base"))
    write_corpus(base / "corpus", repeating_documents(64, 4, 4, range(10, 200)), ("train", "validation"))
    return base


def invoke(gpu_run: ModuleType, base: Path, runs: Path, *arguments: str) -> Result:
    return CliRunner().invoke(gpu_run.app, [*arguments, "--base", str(base), "--runs", str(runs)])


def train(gpu_run: ModuleType, base: Path, runs: Path, *arguments: str, **settings: object) -> Result:
    values = [part for key, value in (SMALL | settings).items() for part in ("--set", f"{key}={value}")]
    return invoke(gpu_run, base, runs, "train", *arguments, *values)


def test_a_run_that_was_stopped_goes_on_to_the_same_updates(gpu_run: ModuleType, base: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(gpu_run, base, whole, "full").exit_code == 0
    stopped = train(gpu_run, base, parts, "full", "--seconds", "0")
    assert stopped.exit_code == 3 and "saved" in stopped.output
    assert not (parts / "full" / "model").exists()
    assert train(gpu_run, base, parts, "full").exit_code == 0
    expected, found = (load_file(runs / "full" / "lora.safetensors") for runs in (whole, parts))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_the_updates_of_a_run_go_on_in_the_next_and_keep_their_rank(
    gpu_run: ModuleType, base: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    assert train(gpu_run, base, runs, "cpt", "--name", "first").exit_code == 0
    assert train(gpu_run, base, runs, "cpt", "--start", "first", "--lora", "first").exit_code == 0
    untrained = gpu_run._untrained(base, []).decoder.state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    first, second = (RefragModel.load(runs / run / "model").decoder.state_dict()[name] for run in ("first", "cpt"))
    assert not torch.equal(first, second)
    assert torch.linalg.matrix_rank(second - untrained[name], rtol=1e-4) == 2


def test_updates_of_a_run_that_is_not_the_start_are_refused(gpu_run: ModuleType, base: Path, tmp_path: Path) -> None:
    refused = train(gpu_run, base, tmp_path / "runs", "cpt", "--lora", "first")
    assert refused.exit_code == 2 and "--start first" in refused.output


@pytest.mark.parametrize("system", ["refrag", "none"])
def test_runs_are_scored_on_the_same_windows(gpu_run: ModuleType, base: Path, tmp_path: Path, system: str) -> None:
    runs = tmp_path / "runs"
    stage = "cpt" if system == "refrag" else system
    for name, rate in (("slow", 1e-9), ("fast", 0.01)):
        assert train(gpu_run, base, runs, stage, "--name", name, decoder_learning_rate=rate).exit_code == 0
    windows = ["--context", "16", "--output", "16", "--windows", "4"]
    assert invoke(gpu_run, base, runs, "score", "slow", "fast", "--system", system, *windows).exit_code == 0
    scores = {name: json.loads((runs / name / "score.json").read_text()) for name in ("slow", "fast")}
    assert scores["slow"]["windows"] == scores["fast"]["windows"] == 4
    assert scores["fast"]["P16"] != scores["slow"]["P16"]


def test_policies_are_averaged_by_weight(gpu_run: ModuleType, tmp_path: Path) -> None:
    own = {}
    for name in ("a", "b"):
        policy = PolicyNetwork(8, 16, 1, 2, 0.25, "question")
        (tmp_path / name / "model").mkdir(parents=True)
        policy.save(tmp_path / name / "model")
        own[name] = policy.state_dict()
    given = ["average", "a=0.75", "b=0.25", "--runs", str(tmp_path), "--name", "mean"]
    assert CliRunner().invoke(gpu_run.app, given).exit_code == 0
    made = tmp_path / "mean" / "model"
    mean = PolicyNetwork.load(made).state_dict()
    for key, tensor in mean.items():
        torch.testing.assert_close(tensor, 0.75 * own["a"][key] + 0.25 * own["b"][key])
    for weight, name, said in (
        ("0.75", "c", "add up to 1.5"),
        ("much", "c", "RUN=WEIGHT"),
        ("0.25", "mean", "already"),
    ):
        given = ["average", "a=0.75", f"b={weight}", "--runs", str(tmp_path), "--name", name]
        refused = CliRunner().invoke(gpu_run.app, given)
        assert refused.exit_code == 2 and said in refused.output and not (tmp_path / "c").exists()
    assert all(torch.equal(mean[key], found) for key, found in PolicyNetwork.load(made).state_dict().items())


def test_a_run_may_decide_a_setting_of_the_model(gpu_run: ModuleType, base: Path, tmp_path: Path) -> None:
    assert train(gpu_run, base, tmp_path, "full", "--model-set", "encoder.pooling=mean").exit_code == 0
    assert RefragModel.load(tmp_path / "full" / "model").encoder.pooling == "mean"
    for wrong in (["--model-set", "cpt.steps=3"], ["--model-set", "encoder.pooling=cls", "--start", "full"]):
        refused = train(gpu_run, base, tmp_path, "none", *wrong)
        assert refused.exit_code == 2 and "--model-set" in refused.output
