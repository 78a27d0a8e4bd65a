"""Training on two processes is the training of one: the same samples, loss and weights, whatever the strategy."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from refrag_platform.corpus.build import build_corpus
from refrag_platform.errors import RefragError
from refrag_platform.project import Project
from refrag_platform.stages import StageContext
from refrag_platform.training.core import metrics
from refrag_platform.training.core.batch import SHARES
from refrag_platform.training.core.ranks import shares
from tests.conftest import ROOT, ZERO2
from tests.training.all_stages import BATCH, STEPS, TASKS, losses, run, task_of

DDP = {key: value for key, value in ZERO2.items() if key != "deepspeed_config"} | {
    "distributed_type": "MULTI_GPU",
    "use_cpu": True,
}
# What each row of a batch is told by, in any batch that it may be part of.
ROWS = {"reconstruction": "tokens", "cpt": "context", "reading": "blocks", "finetuned": "answers", "policy": "kept"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project, folder = Project(ROOT), tmp_path_factory.mktemp("ranks")
    out, work = folder / "content", folder / "work"
    for made in (out, work):
        made.mkdir()
    build_corpus(StageContext(project, project.recipe("tiny"), "corpus", {}, out, work, folder))
    return out


def launch(config: dict[str, Any], corpus: Path, out: Path, *names: str) -> str:
    """Run all_stages.py on the processes of an accelerate config; what they said, which a failure ends with."""
    out.mkdir(exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    command += [str(out / "config.yaml"), "-m", "tests.training.all_stages", str(corpus), str(out), *names]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    return f"{ended.stdout}{ended.stderr}\nended with {ended.returncode}"


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    for name in TASKS:
        run(name, corpus, out / name)
    return out


@pytest.fixture(scope="module")
def ddp(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage on two ranks with DDP, and reconstruction stopped and resumed, in one launch."""
    out = tmp_path_factory.mktemp("ddp")
    said = launch(DDP, corpus, out, *TASKS, "reconstruction+3")
    assert said.endswith("ended with 0"), said
    return out


def shared_config(name: str) -> dict[str, Any]:
    """An accelerate config of models/accelerate, as recipes name it."""
    return yaml.safe_load((ROOT / "models" / "accelerate" / f"{name}.yaml").read_text())


def assert_losses_alike(found: Path, expected: Path) -> None:
    """`found` and `expected`: folders of one task, whose name is that of `expected`."""
    both = losses(found)
    assert len(both) == STEPS
    # A policy's loss is a difference of nearly equal sums of advantages, whose size is 1.
    relative, absolute = (0.0, 2e-4) if expected.name == "policy" else (1e-5, 0.0)
    assert both == pytest.approx(losses(expected), rel=relative, abs=absolute)


def assert_groups_alike(found: Path, expected: Path) -> None:
    """The rewards of a policy's groups, and how much they differ within one; other samples would move both by 1e-4."""
    lines, others = (metrics.read(folder / "metrics.jsonl") for folder in (found, expected))
    for figure in ("reward", "reward_spread"):
        told = [line[figure] for line in others if figure in line]
        assert told
        assert [line[figure] for line in lines if figure in line] == pytest.approx(told, rel=0, abs=1e-5), figure


def assert_published_alike(found: Path, expected: Path) -> None:
    files = sorted(path.relative_to(expected) for path in (expected / "published").rglob("*.safetensors"))
    assert files
    for file in files:
        one, other = load_file(found / file), load_file(expected / file)
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            if name == "head.1.bias":  # Of all chunks' scores alike: its gradient is rounding, which AdamW scales up.
                assert one[name].shape == tensor.shape
                continue
            torch.testing.assert_close(one[name].view_as(tensor), tensor, rtol=1e-3, atol=1e-3, msg=f"{file} {name}")
    # Bit for bit; of sharded weights, what each rank gathered.
    assert (found / "rank0.safetensors").read_bytes() == (found / "rank1.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_two_ranks_have_the_loss_of_one_process(ddp: Path, alone: Path, name: str) -> None:
    assert_losses_alike(ddp / name, alone / name)
    if name == "policy":
        assert_groups_alike(ddp / name, alone / name)
    for one, other in zip(*(metrics.read(folder / name / "metrics.jsonl") for folder in (ddp, alone)), strict=True):
        assert one.keys() == other.keys()
        if name == "reconstruction":  # What its run is judged by.
            assert one["reconstruction_loss"] == pytest.approx(other["reconstruction_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_what_is_published_is_whole_and_that_of_one_process(ddp: Path, alone: Path, name: str) -> None:
    assert_published_alike(ddp / name, alone / name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_the_same_and_stage_2_goes_on_with_another_number_of_processes(
    corpus: Path, alone: Path, tmp_path: Path, stage: int
) -> None:
    pytest.importorskip("deepspeed")
    if stage == 2:
        config = shared_config("zero2")
    else:
        # Else stage 3 would leave every weight of so small a model whole.
        whole = {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
        cut = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        deepspeed = {"zero_optimization": {"stage": 3, **whole}, **dict.fromkeys(cut, "auto")}
        (tmp_path / "deepspeed.json").write_text(json.dumps(deepspeed))
        config = {**ZERO2, "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "deepspeed.json")}}
    # The policy is refused where weights are sharded.
    names = ("reconstruction+3", "cpt", "reading", "finetuned", *(["policy"] if stage == 2 else []))
    said = launch(config, corpus, tmp_path, *names)
    assert said.endswith("ended with 0"), said
    for name in names:
        expected = alone / name.partition("+")[0]
        assert_losses_alike(tmp_path / name, expected)
        assert_published_alike(tmp_path / name, expected)
    if stage == 2:
        assert_groups_alike(tmp_path / "policy", alone / "policy")
    shutil.rmtree(tmp_path / "cpt" / "checkpoints" / f"step-{STEPS:08d}")
    one = {**config, "num_processes": 1}
    said = launch(one, corpus, tmp_path, "cpt")
    assert "was saved by 2 processes, and 1 would go on from it: launch 2 again" in said
    commands = re.findall(r"`python (-m deepspeed.*?)`", said)
    assert len(commands) == (1 if stage < 3 else 0), said
    if stage < 3:
        subprocess.run([sys.executable, *shlex.split(commands[0])], check=True, capture_output=True)
        said = launch(one, corpus, tmp_path, "cpt")
        assert said.endswith("ended with 0"), said
        assert losses(tmp_path / "cpt") == pytest.approx(losses(alone / "cpt"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero1", "zero3"])
def test_the_shared_config_trains_the_same(corpus: Path, alone: Path, tmp_path: Path, config: str) -> None:
    """zero3.yaml leaves the optimizer in the CPU's memory."""
    pytest.importorskip("deepspeed")
    said = launch(shared_config(config), corpus, tmp_path, "cpt")
    assert said.endswith("ended with 0"), said
    assert_losses_alike(tmp_path / "cpt", alone / "cpt")
    assert_published_alike(tmp_path / "cpt", alone / "cpt")


@pytest.mark.parametrize("name", TASKS)
def test_each_row_of_a_batch_is_on_one_rank(corpus: Path, name: str) -> None:
    task, _ = task_of(name, corpus)
    for step in range(STEPS):
        whole, *parts = (
            task.batch(step, 0, task.samples(step, BATCH), rank, world) for rank, world in ((0, 1), (0, 2), (1, 2))
        )
        # Some steps of reading continue text.
        told = ROWS[name] if ROWS[name] in whole else "context"
        rows = [part[told] for part in parts]
        assert torch.equal(torch.cat(rows), whole[told])
        assert name == "policy" or not torch.equal(*rows)


@pytest.mark.parametrize("name", TASKS)
def test_parts_of_a_batch_weigh_what_they_hold(corpus: Path, name: str) -> None:
    evidence = {"evidence_steps": 3, "evidence_weight": 0.5} if name == "policy" else {}
    task, _ = task_of(name, corpus, **evidence)
    for step in range(STEPS):
        size = task.samples(step, BATCH)
        whole, *parts = (task.batch(step, 0, size, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2)))
        if "evidence" in whole:  # Rows that have none are not counted.
            for batch in (whole, parts[0]):
                batch["evidence"][0] = 0
        for batch in (whole, *parts):
            task.prepare_updates(batch)
        weights = shares([task.counts(part) for part in parts], Accelerator(cpu=True))
        losses = [task(part | {SHARES: its_shares})[0] for part, its_shares in zip(parts, weights, strict=True)]
        # A policy's advantages are divided by how little its rewards differ.
        torch.testing.assert_close(
            torch.stack(losses).mean(), task(whole)[0], rtol=1e-5, atol=2e-4 if name == "policy" else 0
        )


def test_a_policy_s_groups_draw_and_are_judged_as_in_one_process(corpus: Path) -> None:
    task, _ = task_of("policy", corpus)
    for step in range(STEPS):
        whole, *parts = (task.batch(step, 0, BATCH, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2)))
        for batch in (whole, *parts):
            task.prepare_updates(batch)
        for part, rows in zip(parts, (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)), strict=True):
            assert torch.equal(part["picks"], whole["picks"][rows, :, : part["most_kept"]])
            torch.testing.assert_close(part["rewards"], whole["rewards"][rows], rtol=0, atol=1e-5)
            # Rewards of random weights differ by a thousandth, by which rounding is divided.
            torch.testing.assert_close(part["advantage"], whole["advantage"][rows], rtol=0, atol=0.01)


@pytest.mark.slow
def test_resumed_ranks_see_the_samples_that_were_next(ddp: Path) -> None:
    assert losses(ddp / "reconstruction+3") == losses(ddp / "reconstruction")


@pytest.mark.slow
def test_another_number_of_processes_is_refused_with_what_to_do(ddp: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(ddp / "reconstruction", tmp_path / "run")
    with pytest.raises(
        RefragError, match=r"step-00000006 was saved by 2 processes, and 1 would go on .* launch 2 again"
    ):
        run("reconstruction", corpus, tmp_path / "run")


@pytest.mark.slow
def test_a_rank_whose_weights_are_others_is_named(ddp: Path) -> None:
    assert "weights are no longer the same (rank 0's differ from those of 1)" in (ddp / "unlike.txt").read_text()
