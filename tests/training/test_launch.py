"""A stage on two processes: DeepSpeed ZeRO through the accelerate config file that the recipe names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from refrag_platform.errors import RecipeError
from refrag_platform.project import Project
from refrag_platform.recipes import merge
from refrag_platform.stages import run_stage
from refrag_platform.training.core import metrics

pytest.importorskip("deepspeed")

ZERO2 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {"zero_stage": 2},
    "num_machines": 1,
    "num_processes": 2,
    "main_process_port": 0,
}


def use(project: Project, config: dict[str, object], **changes: object) -> None:
    """Name an accelerate config in tiny's reconstruction."""
    path = project.recipe_path("tiny")
    (path.parent / "launch.yaml").write_text(yaml.safe_dump(config))
    recipe = yaml.safe_load(path.read_text())
    section = {"steps": 6, "log_every": 2, "save_every": 3, "accelerate_config": "launch.yaml", **changes}
    path.write_text(yaml.safe_dump(merge(recipe, {"reconstruction": section})))


@pytest.fixture
def on_cpus(monkeypatch: pytest.MonkeyPatch, project: Project) -> Project:
    """DeepSpeed on CPU processes; the project's own code is what the ranks import."""
    for name, value in {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(project.root)}.items():
        monkeypatch.setenv(name, value)
    return project


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(folder / "metrics.jsonl")]


@pytest.mark.slow
def test_two_ranks_of_zero_2_train_the_model_that_one_process_trains(on_cpus: Project) -> None:
    run_stage(on_cpus, "corpus", "tiny")
    use(on_cpus, ZERO2)
    both = run_stage(on_cpus, "reconstruction", "tiny")
    found = losses(both.path)
    use(on_cpus, ZERO2, accelerate_config=None)
    alone = run_stage(on_cpus, "reconstruction", "tiny")
    assert losses(alone.path) == pytest.approx(found, rel=0.02)
    assert json.loads((alone.path / "content" / "training.json").read_text())["steps"] == 6
    assert (both.manifest.metrics["last_loss"]) == found[-1]


@pytest.mark.slow
def test_sharded_weights_and_missing_config_files_are_refused(
    on_cpus: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    run_stage(on_cpus, "corpus", "tiny")
    use(on_cpus, {**ZERO2, "deepspeed_config": {"zero_stage": 3}})
    with pytest.raises(Exception, match=r"launch.yaml launched ended with status"):
        run_stage(on_cpus, "reconstruction", "tiny")
    assert "use DDP or DeepSpeed ZeRO stage 1 or 2" in capfd.readouterr().err
    (on_cpus.recipe_path("tiny").parent / "launch.yaml").unlink()
    with pytest.raises(RecipeError, match=r"reconstruction.accelerate_config of tiny: no file"):
        run_stage(on_cpus, "reconstruction", "tiny")
