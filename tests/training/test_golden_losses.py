"""Golden loss curves: what each training stage's loss is at fixed steps of a short run on tiny, with a fixed seed.

A change that was to leave training as it is leaves these figures; one that was not writes them anew, and says why.
The tolerance is what processors may differ by.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import Recipe
from refrag_platform.training.core.loop import Task, train
from refrag_platform.training.cpt import cpt_task
from refrag_platform.training.examples import Examples
from refrag_platform.training.finetuned import FinetunedTask
from refrag_platform.training.policy import policy_task
from refrag_platform.training.reconstruction import reconstruction_task
from tests.training.conftest import repeating_documents, write_corpus
from tests.training.test_examples import write_questions

STEPS, SHOWN, TOLERANCE = 8, (1, 2, 4, 8), 0.001
Make = Callable[[RefragModel, Path, Recipe], Task]
TASKS: dict[str, Make] = {
    "reconstruction": lambda model, corpus, recipe: reconstruction_task(model, corpus, recipe.reconstruction, 0),
    "cpt": lambda model, corpus, recipe: cpt_task(model, corpus, recipe.cpt, 0),
    "cpt-full": lambda model, corpus, recipe: cpt_task(model, corpus, recipe.cpt, 0, "full"),
    "finetuned": lambda model, corpus, recipe: FinetunedTask(
        model, recipe.finetuned, Examples(corpus, recipe.finetuned, 0)
    ),
    "finetuned-plain": lambda model, corpus, recipe: FinetunedTask(
        model, recipe.finetuned, Examples(corpus, recipe.finetuned, 0), "plain"
    ),
    "policy": lambda model, corpus, recipe: policy_task(model, corpus, recipe.policy, 0),
}
GOLDEN = {
    "reconstruction": [6.8974, 6.9044, 6.9317, 6.9055],
    "cpt": [6.9099, 6.7760, 6.4273, 6.0776],
    "cpt-full": [6.9118, 6.7809, 6.4349, 6.0917],
    "finetuned": [6.9249, 6.4760, 6.0084, 5.5267],
    "finetuned-plain": [6.9314, 6.4753, 5.9969, 5.5257],
    "policy": [-6.9070, -6.9010, -6.9248, -6.9204],
}


@pytest.mark.parametrize("run", TASKS)
def test_the_loss_goes_as_it_always_did(recipe: Recipe, model: RefragModel, tmp_path: Path, run: str) -> None:
    corpus = write_corpus(tmp_path / "corpus", repeating_documents(16, 10, 40, range(100, 132)))
    write_questions(corpus)
    stage = run.partition("-")[0]
    short = {"steps": STEPS, "batch_size": 4, "log_every": 1, "save_every": 100, "precision": "fp32"}
    if stage == "finetuned":
        short["tasks"] = {"rag": 0.7, "multi_turn": 0.3}
    recipe = recipe.model_copy(update={stage: getattr(recipe, stage).model_copy(update=short)})
    task = TASKS[run](model, corpus, recipe)
    train(task, getattr(recipe, stage), tmp_path, run)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # A policy's loss is about zero; the reward that it is taught by is not.
    figure = "reward" if run == "policy" else task.judged_by
    losses = [round(line[figure], 4) for line in lines if line["step"] in SHOWN]
    assert losses == pytest.approx(GOLDEN[run], rel=TOLERANCE), f'"{run}": {losses},'
