"""Train and evaluate on a bare GPU machine from what `gpu_pieces.py` carried there; no DVC, no corpus stage.

python scripts/gpu_run.py train reconstruction --base /tmp/base --runs /tmp/runs --seconds 500
python scripts/gpu_run.py train cpt --base /tmp/base --runs /tmp/runs --set steps=1500           (`none`: a control)
python scripts/gpu_run.py evaluate --base /tmp/base --runs /tmp/runs --out results
python scripts/gpu_run.py train finetuned --base /tmp/base --runs /tmp/runs --start cpt
    --set questions=[train.jsonl] --set distractors=[passages.jsonl]
python scripts/gpu_run.py train finetuned-full ... --start full --name tuned/full                  (a control)
python scripts/gpu_run.py train policy --base /tmp/base --runs /tmp/runs --start finetuned --set questions=[train.jsonl]
python scripts/gpu_run.py average policy-a=0.7 policy-b=0.3 --runs /tmp/runs --name policy
python scripts/gpu_run.py selection --base /tmp/base --runs /tmp/runs --model /tmp/runs/finetuned/model --policy policy
    --questions dev.jsonl --out out
cp /tmp/runs/policy/model/policy.* /tmp/runs/finetuned/model
python -m refrag_platform evaluate rag --model /tmp/runs/finetuned/model --controls /tmp/runs/tuned
    --recipe /tmp/base/recipe.yaml --questions dev.jsonl --batch-size 32 --json rag.json

A run that is stopped (by --seconds or a signal) continues when it is started again with the same settings.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
import typer
import yaml
from gpu_pieces import base_recipe
from safetensors.torch import load_file, save_file

from refrag_platform.corpus.question_files import read_passages, read_questions
from refrag_platform.evaluation.decoders import control_folders, untuned_decoder
from refrag_platform.evaluation.metrics import log_perplexity
from refrag_platform.evaluation.perplexity import evaluate_perplexity
from refrag_platform.evaluation.reconstruction import reconstruction_accuracy
from refrag_platform.evaluation.report import perplexity_report
from refrag_platform.evaluation.scoring import score_plain, score_refrag
from refrag_platform.evaluation.selection import evaluate_selection, judged_questions, judged_windows
from refrag_platform.evaluation.selection_report import selection_report
from refrag_platform.evaluation.windows import split_windows
from refrag_platform.files import write_json
from refrag_platform.model.loading import default_device, default_dtype, load_control
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import Recipe, System, TrainingRecipe
from refrag_platform.store.relevance import recipe_relevance
from refrag_platform.training.core.loop import Task, TrainingInterrupted, train
from refrag_platform.training.core.lora import continue_lora, lora_state, merge_lora
from refrag_platform.training.core.windows import Windows
from refrag_platform.training.cpt import cpt_task
from refrag_platform.training.examples import Examples
from refrag_platform.training.finetuned import FinetunedTask, text_windows
from refrag_platform.training.policy import PolicyTask, policy_task
from refrag_platform.training.reconstruction import reconstruction_task

Stage = Literal[
    "reconstruction", "cpt", "policy", "none", "full", "truncated",
    "finetuned", "finetuned-none", "finetuned-full", "finetuned-truncated",
]  # fmt: skip
Base = Annotated[Path, typer.Option("--base", help="The assembled base folder.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of the runs: a folder for each, with its model.")]
app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False, help=__doc__)


@app.command("train")
def train_stage(
    stage: Annotated[Stage, typer.Argument(help="A stage, or a control: full, none, truncated.")],
    base: Base,
    runs: Runs,
    name: Annotated[str | None, typer.Option("--name", help="Folder of the run; default: the stage.")] = None,
    start: Annotated[
        str | None, typer.Option("--start", help="Start from the model of this run; default: base.")
    ] = None,
    policy: Annotated[str | None, typer.Option("--policy", help="policy: the run of another to go on from.")] = None,
    lora: Annotated[
        str | None, typer.Option("--lora", help="Go on with this run's low-rank updates; --start is that run, too.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="cpt: the run of the control `full` whose predictions are learned.")
    ] = None,
    values: Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe's section.")] = None,
    model_values: Annotated[
        list[str] | None,
        typer.Option("--model-set", help="section.key=value of the untrained model, e.g. encoder.pooling=mean."),
    ] = None,
    freeze_embeddings: Annotated[
        bool, typer.Option(help="Keep the decoder's (tied) embeddings as they were: less to carry back.")
    ] = True,
    seconds: Annotated[float | None, typer.Option("--seconds", help="Stop, saved, after this long.")] = None,
) -> None:
    """Train one run to its end, or until --seconds have passed; started again, it goes on from there."""
    if lora and lora != start:
        raise typer.BadParameter(f"--lora {lora}: its updates are merged into its own model; give --start {lora}, too")
    if start and model_values:
        raise typer.BadParameter(f"--model-set {model_values[0]}: --start {start} has its model; leave one of them out")
    if policy and (stage != "policy" or policy == (name or stage)):
        raise typer.BadParameter(f"--policy {policy}: {stage} reads none, or it is the run to make; give --name, too")
    if teacher and stage != "cpt":
        raise typer.BadParameter(f"--teacher {teacher}: only cpt learns from a teacher, not {stage}")
    if teacher:
        values = [*(values or []), f"teacher={runs / teacher / 'model'}"]
    recipe, folder = _recipe(base, stage, values or []), runs / (name or stage)
    if (folder / "model" / ("policy.json" if stage == "policy" else "model.json")).is_file():
        typer.echo(f"{folder} is finished; remove it to train it again")
        return
    torch.set_float32_matmul_precision("high")
    model = RefragModel.load(runs / start / "model") if start else _untrained(base, model_values or [])
    network = PolicyNetwork.load(runs / policy / "model") if policy else None
    task = _task(stage, model, network, recipe, base, freeze_embeddings)
    if lora:
        continue_lora(model, load_file(runs / lora / "lora.safetensors"))
    settings: TrainingRecipe = getattr(recipe, _section(stage))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
    begun = time.monotonic()

    def on_step(step: int) -> None:
        if seconds is not None and time.monotonic() - begun > seconds:
            signal.raise_signal(signal.SIGTERM)

    try:
        summary = train(task, settings, folder, f"{name or stage}", on_step=on_step)
    except TrainingInterrupted as stopped:
        typer.echo(str(stopped))
        sys.exit(3)
    if updates := lora_state(model):
        save_file({key: tensor.cpu() for key, tensor in updates.items()}, folder / "lora.safetensors")
    merge_lora(model)
    (folder / "model").mkdir(exist_ok=True)
    if isinstance(task, PolicyTask):
        task.policy.save(folder / "model")
    else:
        model.save(folder / "model")
    # The optimizer's state is of no more use, and large.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    write_json(folder / "summary.json", {**summary, "seconds": time.monotonic() - begun})
    typer.echo(json.dumps(summary))


@app.command()
def evaluate(
    base: Base,
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", help="Folder for perplexity.json.")],
    model: Annotated[Path | None, typer.Option("--model", help="Model folder; default: the run cpt's.")] = None,
    windows: Annotated[int, typer.Option("--windows", help="Held-out windows, at most.")] = 1000,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 32,
) -> None:
    """Log-perplexity of the run cpt, beside the untuned decoder and the controls that were trained."""
    torch.set_float32_matmul_precision("high")
    trained = RefragModel.load(model or runs / "cpt" / "model", device=default_device())
    recipe = base_recipe(base)
    context, output = recipe.evaluation.context_tokens, recipe.evaluation.output_tokens
    found = split_windows(base / "corpus", "validation", context, output, windows, recipe.seed)
    untuned = untuned_decoder(recipe, base, trained)
    controls = control_folders(_linked_controls(runs)) if _trained_controls(runs) else {}
    result = evaluate_perplexity(
        trained, None, found, untuned=untuned, controls=controls, batch_size=batch_size, seed=recipe.seed
    )
    write_json(out / "perplexity.json", result)
    typer.echo(perplexity_report(result))


@app.command()
def score(
    base: Base,
    runs: Runs,
    names: Annotated[list[str], typer.Argument(help="Runs of one system, say at several learning rates.")],
    system: Annotated[System, typer.Option("--system", help="What the runs were trained to read.")] = "refrag",
    context: Annotated[int, typer.Option("--context", help="s: context tokens.")] = 1024,
    output: Annotated[int, typer.Option("--output", help="o: predicted tokens.")] = 128,
    windows: Annotated[int, typer.Option("--windows", help="Held-out windows, at most.")] = 200,
) -> None:
    """Held-out log-perplexity of some runs alone, written to score.json of each: to choose among them."""
    torch.set_float32_matmul_precision("high")
    found = split_windows(base / "corpus", "validation", context, output, windows, base_recipe(base).seed)
    for name in names:
        model = RefragModel.load(runs / name / "model", device=default_device())
        if system == "refrag":
            nll = score_refrag(model, None, found, 0.0, batch_size=32)
        else:
            nll = score_plain(model.decoder, system, found, model.chunk_size, model.start_token_id, batch_size=32)
        asked = {"run": name, "system": system, "context": context, "output": output, "windows": len(found)}
        figures = asked | log_perplexity(nll)
        write_json(runs / name / "score.json", figures)
        typer.echo(json.dumps(figures))


@app.command()
def reconstruct(
    base: Base,
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", help="Folder for reconstruction.json.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="Model folder; default: the run reconstruction's.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Held-out samples of each length.")] = 1024,
    greedy: Annotated[int, typer.Option("--greedy", help="Samples of them decoded greedily.")] = 256,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="Ask as cpt does: the start token behind the vectors.")
    ] = False,
) -> None:
    """Share of held-out tokens that the decoder recovers from 1, 8 and 32 chunk vectors."""
    torch.set_float32_matmul_precision("high")
    trained = RefragModel.load(model or runs / "reconstruction" / "model", device=default_device())
    rows = []
    for chunks in (1, 8, 32):
        windows = Windows(base / "corpus", "validation", chunks * trained.chunk_size, seed=0)
        rows.append(reconstruction_accuracy(trained, windows.batch(0, 0, samples), greedy, 64, repeat))
        typer.echo(json.dumps(rows[-1]))
    write_json(out / "reconstruction.json", {"rows": rows})


@app.command()
def selection(
    base: Base,
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", help="Folder for selection-windows.json or selection-questions.json.")],
    policy: Annotated[list[str], typer.Option("--policy", help="Run of a policy; again for more.")],
    model: Annotated[Path | None, typer.Option("--model", help="Model folder; default: the run cpt's.")] = None,
    questions: Annotated[
        Path | None, typer.Option("--questions", help="Judge answers to these, not windows of the validation split.")
    ] = None,
    distractors: Annotated[Path | None, typer.Option("--distractors", help="Passages for questions with few.")] = None,
    share: Annotated[list[float] | None, typer.Option("--share", help="p; default: 0.1, 0.15, 0.25.")] = None,
    windows: Annotated[int, typer.Option("--windows", help="Windows or questions, at most.")] = 1000,
    passages: Annotated[int, typer.Option("--passages", help="Passages of a question.")] = 8,
    answers: Annotated[bool, typer.Option("--answers", help="Also answer the questions.")] = False,
    oracle: Annotated[int, typer.Option("--oracle", help="Items on which the greedy oracle is tried.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 32,
) -> None:
    """The policies' choice of chunks against others of as many, on windows or on questions."""
    device, recipe = default_device(), base_recipe(base)
    trained = RefragModel.load(model or runs / "cpt" / "model", default_dtype(device), device)
    networks = {name: PolicyNetwork.load(runs / name / "model", device) for name in policy}
    if questions:
        pool = read_passages(distractors) if distractors else None
        reads = any(network.reads_relevance for network in networks.values())
        told = recipe_relevance(recipe, base, device) if reads else None
        judged = judged_questions(trained, read_questions(questions, windows), passages, pool, told)
    else:
        sizes = (recipe.policy.context_tokens, recipe.policy.output_tokens)
        judged = judged_windows(trained, split_windows(base / "corpus", "validation", *sizes, windows, recipe.seed))
    result = evaluate_selection(
        trained,
        networks,
        judged,
        shares=share or [0.1, 0.15, 0.25],
        oracle=oracle,
        answered=answers,
        batch_size=batch_size,
        seed=recipe.seed,
    )
    write_json(out / f"selection-{'questions' if questions else 'windows'}.json", result)
    typer.echo(selection_report(result))


@app.command()
def average(
    runs: Runs,
    policies: Annotated[list[str], typer.Argument(help="RUN=WEIGHT, e.g. policy-a=0.7 policy-b=0.3; of one start.")],
    name: Annotated[str, typer.Option("--name", help="Run to make.")],
) -> None:
    """A policy whose weights are the mean of others': of runs from one start, often better than any of them."""
    try:
        parts = {run: float(weight) for run, _, weight in (text.partition("=") for text in policies)}
    except ValueError:
        raise typer.BadParameter(f"{' '.join(policies)}: give RUN=WEIGHT, e.g. policy-a=0.7") from None
    if abs(sum(parts.values()) - 1) > 1e-6:
        raise typer.BadParameter(f"the weights of {', '.join(policies)} add up to {sum(parts.values()):g}; make it 1")
    if (runs / name).exists():
        raise typer.BadParameter(f"--name {name}: {runs / name} is there already; give another")
    networks = {run: PolicyNetwork.load(runs / run / "model") for run in parts}
    mean, states = next(iter(networks.values())), {run: network.state_dict() for run, network in networks.items()}
    mean.load_state_dict({key: sum(parts[run] * states[run][key] for run in parts) for key in mean.state_dict()})
    (runs / name / "model").mkdir(parents=True)
    mean.save(runs / name / "model")


def _section(stage: Stage) -> str:
    """The recipe's section of a stage; a control is trained as cpt is, or as finetuned is."""
    name = stage.partition("-")[0]
    return name if name in ("reconstruction", "policy", "finetuned") else "cpt"


def _untrained(base: Path, values: list[str]) -> RefragModel:
    """The base's model, with other settings of its sections: for runs that decide between them."""
    recipe = base_recipe(base).model_dump(mode="json")
    for text in values:
        place, _, value = text.partition("=")
        section, _, key = place.partition(".")
        if section not in ("encoder", "projection"):
            raise typer.BadParameter(f"--model-set {text}: {section!r} is no part of the model; give encoder.KEY=VALUE")
        recipe[section][key] = yaml.safe_load(value)
    return RefragModel.create(Recipe.model_validate(recipe), base)


def _recipe(base: Path, stage: Stage, values: list[str]) -> Recipe:
    section = _section(stage)
    recipe = base_recipe(base).model_dump(mode="json")
    recipe[section] |= {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in values)}
    return Recipe.model_validate(recipe)


def _task(
    stage: Stage,
    model: RefragModel,
    policy: PolicyNetwork | None,
    recipe: Recipe,
    base: Path,
    freeze_embeddings: bool,
) -> Task:
    corpus = base / "corpus"
    if stage == "reconstruction":
        task: Task = reconstruction_task(model, corpus, recipe.reconstruction, recipe.seed)
    elif stage == "policy":
        told = recipe_relevance(recipe, base, default_device()) if recipe.policy.relevance else None
        return policy_task(model, corpus, recipe.policy, recipe.seed, start=policy, relevance=told)
    elif _section(stage) == "finetuned":
        system = cast(System, stage.partition("-")[2] or "refrag")
        examples = Examples(corpus, recipe.finetuned, recipe.seed)
        windows = text_windows(corpus, recipe.finetuned, model, recipe.seed)
        task = FinetunedTask(model, recipe.finetuned, examples, system, windows)
    else:
        system = cast(System, "refrag" if stage == "cpt" else stage)
        teacher = load_control(Path(recipe.cpt.teacher), model) if recipe.cpt.teacher else None
        task = cpt_task(model, corpus, recipe.cpt, recipe.seed, system, teacher, root=base)
    if freeze_embeddings:
        model.decoder.get_input_embeddings().requires_grad_(False)
    return task


def _trained_controls(runs: Path) -> list[Path]:
    return [runs / n / "model" for n in ("full", "none", "truncated") if (runs / n / "model" / "model.json").is_file()]


def _linked_controls(runs: Path) -> Path:
    """The controls as `refrag evaluate` wants them: a folder of model folders."""
    target = runs / "controls"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for folder in _trained_controls(runs):
        (target / folder.parent.name).symlink_to(folder.resolve())
    return target


if __name__ == "__main__":
    app()
