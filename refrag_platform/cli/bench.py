"""`refrag bench`: how fast the platform is, each figure beside the plain way of doing the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refrag_platform.cli import bench_service
from refrag_platform.cli.options import Json, RecipeOrFile, find_project, known_recipe, parse_numbers
from refrag_platform.errors import RefragError
from refrag_platform.files import write_json

if TYPE_CHECKING:
    from refrag_platform.bench.shapes import Subject

ShapeName = Annotated[
    str | None, typer.Option(help="A named shape with random weights: llama-2-7b, smollm2-135m, tiny.")
]
ModelName = Annotated[
    str | None, typer.Option("--model", "-m", help="A model of `refrag recipes ls`, with its encoder.")
]
ChunkSizes = Annotated[str, typer.Option(help="Chunk sizes, e.g. 8,16,32.")]
Plot = Annotated[Path | None, typer.Option(help="Draw it here (.png).")]
Question = Annotated[int, typer.Option(min=1, help="Question tokens after the context.")]
Seed = Annotated[int, typer.Option("--seed")]

commands = typer.Typer(
    name="bench", no_args_is_help=True, help="Speed, each figure beside the plain way of doing the same."
)
commands.add_typer(bench_service.commands)


@commands.command()
def latency(
    json: Json,
    shape: ShapeName = None,
    model: ModelName = None,
    context: Annotated[str, typer.Option(help="Context tokens, e.g. 2048,4096,8192.")] = "4096",
    k: ChunkSizes = "8,16,32",
    plot: Plot = None,
    question: Question = 32,
    systems: Annotated[str, typer.Option(help="Of full, refrag, cepe, prefix.")] = "full,refrag,cepe,prefix",
    runs: Annotated[int, typer.Option(min=1, help="Measured runs of everything, in turns.")] = 10,
    warmup: Annotated[int, typer.Option(min=1, help="Runs before them, compilation included.")] = 2,
    seed: Seed = 0,
) -> None:
    """Time to first token (vectors from the store, cached, encoded now), per further token, key-value bytes.

    Beside REFRAG at each k: the full context, CEPE's shape (attention across to the encoder's states in every
    layer) and exact reuse of a shared prefix; with the paper's formula and the arithmetic limit of this machine.
    The model has its own k; another one gets a random projection, and the row says so.
    """
    from refrag_platform.bench.figures import latency_figure
    from refrag_platform.bench.latency import bench_latency
    from refrag_platform.bench.report import system_label
    from refrag_platform.bench.systems import LatencyPlan

    ks, named = parse_numbers("--k", k), tuple(name.strip() for name in systems.split(","))
    plans = [LatencyPlan(s, question, ks, named, runs, warmup, seed) for s in parse_numbers("--context", context)]

    def show(row: dict[str, Any]) -> None:
        times = {"store": "ttft_ms", "cached": "ttft_cached_ms", "uncached": "ttft_uncached_ms", "a token": "ttit_ms"}
        if row["system"] in ("full", "prefix"):
            times = {"first token": "ttft_ms", "first token, cached": "ttft_cached_ms", "a token": "ttit_ms"}
        told = ", ".join(f"{label} {row[name]:,.2f} ms" for label, name in times.items() if row[name] is not None)
        gain = row["ttft_speedup_cached"] or row["ttft_speedup"]
        gain = "" if gain is None or row["system"] == "full" else f", {gain:.2f}x"
        size = f"{row['kv_bytes'] / 2**20:,.1f} MiB"
        typer.echo(f"{row['context']:>7,} {system_label(row):>14}: {told}{gain}, MFU {row['mfu']:.1%}, {size}")

    result = bench_latency(_subject(shape, model), plans, show)
    write_json(json, result)
    if plot:
        latency_figure(result, plot)


@commands.command()
def throughput(
    json: Json,
    shape: ShapeName = None,
    model: ModelName = None,
    context: Annotated[int, typer.Option(min=1, help="Context tokens of each request.")] = 16384,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each request generates.")] = 128,
    k: ChunkSizes = "8,16,32",
    plot: Plot = None,
    question: Question = 32,
    largest: Annotated[int, typer.Option("--largest-batch", min=1, help="Try no larger batch.")] = 512,
    runs: Annotated[int, typer.Option(min=1, help="Measured runs of the whole batch.")] = 3,
    seed: Seed = 0,
) -> None:
    """New tokens per second at the largest batch that fits: reading every context and generating, full and REFRAG."""
    from refrag_platform.bench.figures import throughput_figure
    from refrag_platform.bench.report import system_label
    from refrag_platform.bench.throughput import ThroughputPlan, bench_throughput

    def show(row: dict[str, Any]) -> None:
        speed = f"{row['tokens_per_second']:,.1f} tokens/s, {row['speedup']:.2f}x"
        typer.echo(f"{system_label(row):>14}: {speed} (batch {row['batch']}, {row['seconds']:.2f} s)")

    plan = ThroughputPlan(context, question, new_tokens, parse_numbers("--k", k), runs, largest, seed)
    result = bench_throughput(_subject(shape, model), plan, show)
    write_json(json, result)
    if plot:
        throughput_figure(result, plot)


@commands.command()
def train(
    model: RecipeOrFile,
    json: Json,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps.")] = 20,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them, compilation included.")] = 5,
) -> None:
    """Decoder positions per second, MFU and peak memory of continual pre-training, optimizer included.

    The row `refrag` is the loop of `refrag run cpt`; `plain transformers` is an eager loop with the model's
    own loss on the same batch. A position is what the decoder reads: context_tokens / k vectors and the
    output tokens. Every weight trains, the encoder's too.
    """
    from refrag_platform.bench.train import bench_train
    from refrag_platform.model.refrag import RefragModel

    recipe, base = find_project().recipe_or_file(model)
    settings = recipe.cpt.model_copy(update={"batch_size": batch_size or recipe.cpt.batch_size})
    result = {"model": recipe.name, **bench_train(RefragModel.create(recipe, base), settings, steps, warmup)}
    write_json(json, result)
    for row in result["rows"]:
        mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
        typer.echo(
            f"{row['loop']:>20}: {row['positions_per_second']:,} positions/s, "
            f"{row['step_seconds'] * 1000:.1f} ms a step{mfu}, {row['memory_gb']} GB"
        )


@commands.command()
def encode(
    model: Annotated[str, typer.Option("--model", "-m", help="A model whose corpus and fine-tuned model are made.")],
    json: Json,
    passages: Annotated[int, typer.Option(min=1, help="Encode the corpus' first so many.")] = 8192,
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster: HOST:PORT, or auto. Default: this machine.")
    ] = None,
) -> None:
    """Passages per second into a chunk store: one process, and the workers of a Ray cluster, on the same passages.

    `start` lasts until as many parts are whole as there are processes: they load models first. `join` puts the parts
    together, which is one process' work in both. Both stores must have the same bytes, or the result says so.
    """
    from refrag_platform.bench.encoding import bench_encoding

    result = bench_encoding(find_project(), model, passages, address)
    write_json(json, result)
    for row in result["rows"]:
        typer.echo(
            f"{row['engine']:>8} ({row['processes']}): {row['passages_per_second']:,.1f} passages/s, "
            f"start {row['start_seconds']:.1f} s, join {row['join_seconds']:.1f} s"
        )
    typer.echo(f"{result['passages']:,} passages; {'the same' if result['same_bytes'] else 'NOT the same'} bytes")


@commands.command()
def frontier(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model of `refrag recipes ls` (fine-tuned), or a model folder.")
    ],
    questions: Annotated[
        list[Path], typer.Option(help="Files of questions with passages that the rows were judged on. Repeatable.")
    ],
    rows: Annotated[
        list[Path],
        typer.Option(
            help="Results of `refrag evaluate rag` on these questions, on whatever machine: what they judged of full, "
            "first, plain, sentences and refrag is timed. Repeatable, e.g. a file for each p."
        ),
    ],
    json: Json,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Time this many questions of each file, spread evenly over it.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Of each question in each configuration.")] = 1,
    warmup: Annotated[int, typer.Option(min=1, help="Questions in each before them.")] = 3,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe that names the retriever. Default: the model's, where known.")
    ] = None,
    stores: Annotated[
        Path, typer.Option(help="Folder for the chunk store of all passages; kept, and taken next time.")
    ] = Path("work/frontier"),
    plot: Annotated[Path | None, typer.Option(help="Draw it here (.png or .svg).")] = None,
) -> None:
    """Quality and speed of the same configurations: F1 over time to first token from the question's arrival.

    First judge: refrag evaluate rag --systems full,first,plain,sentences,refrag --shares 0.05,0.1,0.25,0.5 ...
    Then time here what was judged there, on each machine, and put the machines together: refrag bench frontier-join.
    What other weights or questions gave is refused, by the digests in its file.
    Timed is what is served: search in a chunk store of all passages (without lancedb: an exact search in memory, and
    the result says so), choice by the policy or the sentences' nearness, projection, prefill. Chunk vectors and
    sentence vectors are made ahead.
    """
    from refrag_platform.bench.frontier import bench_frontier
    from refrag_platform.bench.judged import read_judged, require_judged
    from refrag_platform.corpus.question_files import read_questions
    from refrag_platform.evaluation.digests import judged_digests
    from refrag_platform.model.loading import load_bundle
    from refrag_platform.store.retriever import load_retriever

    names = [file.name for file in questions]
    if len(set(names)) < len(names):
        raise RefragError(f"--questions names two files alike ({', '.join(names)}); give files of different names")
    judged = read_judged(rows, names)
    bundle = load_bundle(model)
    known = known_recipe(model, bundle, recipe)
    if known is None:
        raise RefragError(f"the recipe of {model}, which names the retriever, isn't known; name it by --recipe")
    files = {file.name: read_questions(file) for file in questions}
    near = load_retriever(known[0].chunks.retriever, known[1], bundle.model.device)
    digests = judged_digests(bundle, near.digest, questions)
    require_judged(rows, digests)
    result = bench_frontier(bundle, known, near, judged, files, limit=limit, runs=runs, warmup=warmup, stores=stores)
    result["machines"][0]["digests"] = digests
    # Where the quality comes from.
    result["judged"] = [file.name for file in rows]
    _tell_frontier(result, json, plot)


@commands.command()
def frontier_join(
    files: Annotated[list[Path], typer.Argument(help="Results of `refrag bench frontier`.")],
    json: Json,
    plot: Annotated[Path | None, typer.Option(help="Draw them here (.png or .svg), a panel a machine.")] = None,
) -> None:
    """Put results of `refrag bench frontier` together: machines side by side, models of other k among the curves."""
    from refrag_platform.bench.frontier import joined

    result = joined(files)
    _tell_frontier(result, json, plot)


@commands.command()
def search(
    model: Annotated[str, typer.Option("--model", "-m", help="A model with a corpus that has questions, and a store.")],
    json: Json,
    passages: Annotated[str, typer.Option(help="Sizes of the store, e.g. 100000,1000000.")] = "100000",
    indexes: Annotated[str, typer.Option(help="Of IVF_RQ (the one that is served), IVF_PQ, IVF_HNSW_SQ.")] = "IVF_RQ",
    questions: Annotated[int, typer.Option(min=1, help="Asked, drawn from the corpus' own.")] = 200,
    folder: Annotated[
        Path | None, typer.Option(help="Where stores lie while they are measured (6 KB a passage); default: /tmp.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Search of a large store, exact and by an index: recall, time, seconds to build, memory, disk.

    The passages are the model's own with their retrieval vectors and, up to --passages, random neighbours of these.
    Exact search and each index have a process of their own, and each question is put to all of them in turn. Example:

    refrag bench search --model smollm2-135m --passages 1000000 --json search.json
    """
    import random

    from refrag_platform.bench.report import search_row
    from refrag_platform.bench.search import bench_search
    from refrag_platform.corpus.question_files import question_files_of, read_questions
    from refrag_platform.store.content import StoreDescription
    from refrag_platform.store.nearest import KINDS
    from refrag_platform.store.retriever import load_retriever

    kinds = [name.strip() for name in indexes.split(",")]
    if unknown := [name for name in kinds if name not in KINDS]:
        raise RefragError(f"--indexes has {unknown[0]!r}; known are {', '.join(KINDS)}")
    project = find_project()
    content, corpus = project.content("chunks", model), project.content("corpus", model)
    texts = {one.question for file in question_files_of(corpus, "validation", "test") for one in read_questions(file)}
    if not texts:
        raise RefragError(f"the corpus of {model} has no questions to ask; give a model whose corpus has some")
    asked = random.Random(seed).sample(sorted(texts), min(questions, len(texts)))
    retriever = load_retriever(StoreDescription.read(content).retriever, project.recipe_path(model).parent)
    result = bench_search(
        content, retriever, asked, parse_numbers("--passages", passages), kinds, folder, seed,
        lambda row: typer.echo("  ".join(search_row(row))),
    )  # fmt: skip
    write_json(json, result)


@commands.command()
def tables(
    document: Annotated[Path, typer.Argument(help="A Markdown file with <!-- bench FILE.json --> ... <!-- end -->.")],
) -> None:
    """Write a document's tables from the result files that it names."""
    from refrag_platform.bench.report import write_tables

    count, missing = write_tables(document)
    typer.echo(f"{document}: {count} blocks" + (f", not measured yet: {', '.join(missing)}" if missing else ""))


def _tell_frontier(result: dict[str, Any], json: Path, plot: Path | None) -> None:
    from refrag_platform.bench.figures import frontier_figure
    from refrag_platform.bench.report import frontier_report

    write_json(json, result)
    if plot:
        frontier_figure(result, plot)
    typer.echo(frontier_report(result))


def _subject(shape: str | None, model: str | None) -> Subject:
    """What --shape or --model names, on the device that is here."""
    from refrag_platform.bench.shapes import named_shape, project_model
    from refrag_platform.model.loading import default_device, default_dtype

    if (shape is None) == (model is None):
        raise RefragError("give either --shape or --model")
    device = default_device()
    dtype = default_dtype(device)
    return named_shape(shape, device, dtype) if shape else project_model(str(model), device, dtype, find_project())
