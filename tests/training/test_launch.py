"""A stage on two processes: DeepSpeed ZeRO through the accelerate config file that the recipe names."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from refrag_platform.errors import RecipeError
from refrag_platform.project import Project
from refrag_platform.recipes import merge
from refrag_platform.runner import run_stage
from refrag_platform.training.core import checkpoint, metrics
from tests.conftest import ROOT, ZERO2
from tests.processes import wait_for

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

DDP = {**ZERO2, "distributed_type": "MULTI_GPU", "use_cpu": True}
del DDP["deepspeed_config"]
# How long a process may take to get somewhere on a busy machine.
PATIENCE = 200

# Pairs of processes that end while a thread of gloo's waits for the interpreter, as it would on a busy machine.
BUSY_ENDS = """
import os, sys, torch
import torch.distributed as dist
from refrag_platform.processes import leave

def rank(number, store):
    sys.setswitchinterval(1000)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    for value in range(300):
        work = dist.all_reduce(torch.tensor(float(value)), async_op=True)
    work.wait()
    leave(7)

torch.set_num_threads(1)
for pair in range(12):
    children = []
    for number in range(2):
        if not (child := os.fork()):
            rank(number, f"{sys.argv[1]}/{pair}")
        children.append(child)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


@pytest.fixture
def on_cpus(monkeypatch: pytest.MonkeyPatch, project: Project) -> Project:
    """DeepSpeed on CPU processes; the project's own code is what the ranks import. The corpus is made."""
    for name, value in {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(project.root)}.items():
        monkeypatch.setenv(name, value)
    run_stage(project, "corpus", "tiny")
    return project


def use(project: Project, config: dict[str, object], **changes: object) -> None:
    """Name an accelerate config in tiny's reconstruction."""
    path = project.recipe_path("tiny")
    (path.parent / "launch.yaml").write_text(yaml.safe_dump(config))
    recipe = yaml.safe_load(path.read_text())
    section = {"accelerate_config": "launch.yaml", **changes}
    path.write_text(yaml.safe_dump(merge(recipe, {"reconstruction": section})))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(folder / "metrics.jsonl")]


def start(project: Project) -> subprocess.Popen[str]:
    """`refrag run reconstruction` in a process group of its own, as Dagster starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "refrag_platform", "run", "reconstruction", "--model", "tiny"],
        cwd=project.root,
        env={**os.environ, "REFRAG_ROOT": str(project.root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ranks(project: Project) -> list[psutil.Process]:
    """The launched processes of a project that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(project.root) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def hpz(folder: Path) -> dict[str, object]:
    """zero3-node.yaml for a machine of two processes, which names DeepSpeed's settings beside itself."""
    shared = ROOT / "models" / "accelerate"
    settings = json.loads((shared / "zero3-node.json").read_text())
    settings["zero_optimization"] |= {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    (folder / "zero3-node.json").write_text(json.dumps(settings))
    here = {"num_machines": 1, "num_processes": 2, "main_process_port": 0}
    return {**yaml.safe_load((shared / "zero3-node.yaml").read_text()), **here}


@pytest.mark.parametrize("config", [ZERO2, DDP, None], ids=["zero2", "ddp", "hpz"])
def test_two_ranks_train_the_model_that_one_process_trains(
    on_cpus: Project, capfd: pytest.CaptureFixture[str], config: dict[str, object] | None
) -> None:
    config = config or hpz(on_cpus.recipe_path("tiny").parent)
    # The helper loss has faded by step 6: its heads are no part of the later steps' loss.
    use(on_cpus, config, steps=12, log_every=1, save_every=5)
    both = run_stage(on_cpus, "reconstruction", "tiny")
    found = losses(both.path)
    assert capfd.readouterr().err.count("12/12 steps") == 1  # one bar, not one of each rank
    use(on_cpus, config, accelerate_config=None)
    alone = run_stage(on_cpus, "reconstruction", "tiny")
    # Ranks that saw the same data, or whose gradients weren't averaged, would be off in the third digit.
    assert losses(alone.path) == pytest.approx(found, rel=1e-5)
    assert json.loads((both.path / "content" / "training.json").read_text())["steps"] == 12
    assert both.manifest.metrics["last_loss"] == both.manifest.metrics["reconstruction_loss"]


def test_stopped_ranks_save_and_continue_on_the_same_curve(on_cpus: Project) -> None:
    use(on_cpus, ZERO2, steps=150, log_every=1, save_every=1000)
    state = on_cpus.work_dir("reconstruction", "tiny") / "state"
    process = start(on_cpus)
    wait_for(lambda: len(losses(state)) > 3 or process.poll() is not None, PATIENCE)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3 and "launch.yaml launched were stopped. Run it again" in output, output
    (saved,) = checkpoint.complete(state / "checkpoints")
    done = json.loads((saved / checkpoint.COMPLETE).read_text())["step"]
    assert 3 < done < 150 and len(losses(state)) == done
    resumed = losses(run_stage(on_cpus, "reconstruction", "tiny").path)
    use(on_cpus, ZERO2, accelerate_config=None)
    assert losses(run_stage(on_cpus, "reconstruction", "tiny").path) == pytest.approx(resumed, rel=1e-3)


def test_ranks_that_are_done_leave_whatever_gloos_threads_still_hold(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUSY_ENDS, str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["7"] * 24, found.stderr


def test_ranks_end_with_a_killed_run(on_cpus: Project) -> None:
    use(on_cpus, ZERO2, steps=100_000, log_every=1, save_every=200_000)
    state = on_cpus.work_dir("reconstruction", "tiny") / "state"
    process = start(on_cpus)
    wait_for(lambda: bool(losses(state)) or process.poll() is not None, PATIENCE)
    assert len(ranks(on_cpus)) == 3  # the launcher and two ranks
    process.kill()
    process.wait()
    wait_for(lambda: not ranks(on_cpus), PATIENCE)


def test_two_machines_train_together(on_cpus: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    use(on_cpus, DDP, steps=6, log_every=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The file is of one machine; each says its place in the cluster.
    place = f"--num_machines 2 --main_process_ip 127.0.0.1 --main_process_port {port} --machine_rank"
    monkeypatch.setenv("REFRAG_LAUNCH", f"{place} 0")
    first = start(on_cpus)
    job = on_cpus.work_dir("reconstruction", "tiny") / "state" / "job.json"
    wait_for(lambda: job.is_file() or first.poll() is not None, PATIENCE)
    config = on_cpus.recipe_path("tiny").parent / "launch.yaml"
    command = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config), *place.split(), "1"]
    second = [sys.executable, *command, "-m", "refrag_platform.training.launch", str(job)]
    joined = subprocess.run(second, cwd=on_cpus.root, capture_output=True, text=True, timeout=PATIENCE, check=False)
    output, _ = first.communicate(timeout=PATIENCE)
    assert (first.returncode, joined.returncode) == (0, 0), output + joined.stderr
    assert len(losses(on_cpus.stage_dir("reconstruction", "tiny"))) == 6


def test_configs_that_cannot_work_are_refused(on_cpus: Project, capfd: pytest.CaptureFixture[str]) -> None:
    use(on_cpus, {**DDP, "distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}})
    with pytest.raises(Exception, match=r"launch.yaml launched ended with status"):
        run_stage(on_cpus, "reconstruction", "tiny")
    assert (
        "launch.yaml: FSDP is not supported, on CPUs or GPUs; use DDP, or DeepSpeed ZeRO stage 3"
        in capfd.readouterr().err
    )
    use(on_cpus, {**DDP, "distributed_type": "MULTI_CPU"})
    with pytest.raises(Exception, match=r"launch.yaml launched ended with status"):
        run_stage(on_cpus, "reconstruction", "tiny")
    assert "asks for 2 processes, accelerate started 1" in capfd.readouterr().err
    (on_cpus.recipe_path("tiny").parent / "launch.yaml").unlink()
    with pytest.raises(RecipeError, match=r"reconstruction.accelerate_config of tiny: no file"):
        run_stage(on_cpus, "reconstruction", "tiny")
