"""Each training stage for a few steps, in one process or launched in several; test_ranks.py compares what is written.

    accelerate launch --config_file CONFIG -m tests.training.all_stages CORPUS OUT NAME ...

One that is named NAME+STEPS is stopped after that many, and goes on.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from refrag_platform.errors import RefragError
from refrag_platform.model.refrag import RefragModel
from refrag_platform.processes import leave
from refrag_platform.project import Project
from refrag_platform.recipes import ReadingRecipe, Recipe
from refrag_platform.training.core import metrics
from refrag_platform.training.core.loop import Task, TrainingInterrupted, train
from refrag_platform.training.core.ranks import is_main, refuse_other_weights
from refrag_platform.training.cpt import cpt_task
from refrag_platform.training.examples import Examples
from refrag_platform.training.finetuned import FinetunedTask
from refrag_platform.training.policy import PolicyTask, policy_task
from refrag_platform.training.reconstruction import reconstruction_task
from tests.conftest import ROOT

STEPS, BATCH = 6, 4
SHORT: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "log_every": 1, "save_every": 4, "precision": "fp32"}
READING = ReadingRecipe(blocks=4, block_tokens=64)
# By name: the stage, its settings, and its task.
Make = Callable[[RefragModel, Path, Recipe], Task]
TASKS: dict[str, tuple[str, dict[str, Any], Make]] = {
    "reconstruction": ("reconstruction", {}, lambda m, c, r: reconstruction_task(m, c, r.reconstruction, 0)),
    "cpt": ("cpt", {"mixed_steps_share": 0.5, "mixed_share_kept": 0.5}, lambda m, c, r: cpt_task(m, c, r.cpt, 0)),
    "reading": ("cpt", {"curriculum": None, "reading": READING}, lambda m, c, r: cpt_task(m, c, r.cpt, 0)),
    "finetuned": ("finetuned", {}, lambda m, c, r: FinetunedTask(m, r.finetuned, Examples(c, r.finetuned, 0))),
    "policy": ("policy", {"question_share": 0.5}, lambda m, c, r: policy_task(m, c, r.policy, 0)),
}


def task_of(name: str, corpus: Path, **changes: Any) -> tuple[Task, Any]:
    """A task of tiny, and its settings."""
    project = Project(ROOT)
    stage, settings, make = TASKS[name]
    recipe = project.recipe("tiny")
    section = getattr(recipe, stage).model_copy(update={**SHORT, **settings, **changes})
    recipe = recipe.model_copy(update={stage: section})
    return make(RefragModel.create(recipe, project.recipe_path("tiny").parent), corpus, recipe), section


def run(name: str, corpus: Path, out: Path, stop_after: int | None = None) -> None:
    """Train it in the folder `out`, and save what a stage would publish, and the weights of each rank."""
    task, settings = task_of(name, corpus)
    train(task, settings, out, name, stop_after)
    trained: Any = task.policy if isinstance(task, PolicyTask) else task.model
    # transformers saves on rank 0 alone. Copies: DeepSpeed's weights lie in one storage, which a file refuses.
    weights = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    save_file(weights, out / f"rank{os.environ.get('RANK', '0')}.safetensors")
    if is_main():
        (out / "published").mkdir(exist_ok=True)
        trained.save(out / "published")


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(out / "metrics.jsonl")]


def unlike_weights() -> str:
    """What is said of a layer that rank 1 has otherwise in its last bit."""
    accelerator = Accelerator()
    layer = nn.Linear(2, 2).to(accelerator.device)
    nn.init.constant_(layer.weight, 1.0)
    nn.init.constant_(layer.bias, 1.0)
    refuse_other_weights(accelerator, layer)
    if not is_main():
        layer.bias.data[0] = torch.nextafter(layer.bias.data[0], torch.tensor(2.0))
    try:
        refuse_other_weights(accelerator, layer)
    except RefragError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    corpus, out, *names = sys.argv[1:]
    try:
        for given in names:
            name, _, stop = given.partition("+")
            if stop:
                with suppress(TrainingInterrupted):
                    run(name, Path(corpus), Path(out) / given, int(stop))
            run(name, Path(corpus), Path(out) / given)
        said = unlike_weights()
    except RefragError as error:
        print(f"refrag: {error}", file=sys.stderr)
        leave(1)
    if is_main():
        (Path(out) / "unlike.txt").write_text(said)
    leave(0)
