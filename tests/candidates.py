"""Planted models as the gate sees them, and manifests of which little matters."""

from typing import Any

import pytest

from refrag_platform import runner
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.evaluation.items import FILE_NAME, Items, ItemSet
from refrag_platform.project import Project
from refrag_platform.stages import StageContext
from tests.planted import MODEL, make_all, override, plant, planted

METRICS = ("P32", "exact_match", "f1")
NOTHING: dict[str, Any] = {
    "settings": {}, "seed": 0, "seconds": 0, "hardware": {}, "libraries": {}, "metrics": {},
    **dict.fromkeys(("hash", "fingerprint", "code", "commit", "started", "finished"), ""),
}  # fmt: skip


def manifest_of(stage: str, model: str = MODEL, **facts: Any) -> Manifest:
    """A manifest that says these facts, and nothing else."""
    return Manifest.model_validate({"stage": stage, "model": model} | NOTHING | facts)


def held_out(quality: float, held_out_set: str = "test", metrics: tuple[str, ...] = METRICS) -> Items:
    """Eight windows and eight questions, all as good as `quality` says: 0 to 1, higher is better."""
    names = [str(number) for number in range(8)]
    nats: dict[str, list[float]] = {name: [4 - quality] * 8 for name in metrics if name.startswith("P")}
    answers: dict[str, list[float]] = {name: [quality] * 8 for name in metrics if not name.startswith("P")}
    return Items(windows=ItemSet.of(held_out_set, names, nats), questions=ItemSet.of(held_out_set, names, answers))


def make_candidate(
    project: Project, monkeypatch: pytest.MonkeyPatch, steps: int, items: Items, model: str = MODEL
) -> dict[str, str]:
    """Plant a model that was fine-tuned for `steps` and evaluated to `items`; the hashes of its artifacts."""

    def with_items(context: StageContext) -> dict[str, Any]:
        metrics = planted(context)
        if context.stage == "evaluation":
            (context.out / FILE_NAME).write_text(items.model_dump_json())
            metrics |= {"P32_refrag": 4 - steps / 100, "refrag_f1": steps / 100}
        return metrics

    plant(monkeypatch)
    monkeypatch.setattr(runner, "stage_function", lambda stage: with_items)
    override(project, "finetuned", {"steps": steps}, model)
    return make_all(project, model)
