"""`refrag evaluate`: log-perplexity and question answering of a model, on any documents and questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from refrag_platform.corpus.question_files import Question, Retriever
    from refrag_platform.evaluation.readings import System
    from refrag_platform.evaluation.scoring import PlainSystem
    from refrag_platform.model.loading import Bundle
    from refrag_platform.model.policy import PolicyNetwork
    from refrag_platform.recipes import Recipe
    from refrag_platform.store.relevance import PassageRelevance

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A model of `refrag recipes ls` (its fine-tuned checkpoint), or a model folder."
    ),
]
Json = Annotated[Path, typer.Option("--json", help="Write the result here: {rows: [...], ...}.")]
Report = Annotated[
    Path | None, typer.Option("--report", help="Also write report.md, report.json and a picture into this folder.")
]
Controls = Annotated[
    Path | None,
    typer.Option("--controls", help="Folder of tuned controls: model folders named full, none, truncated."),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        help="Recipe that names the system `untuned`'s decoder, and the retriever whose view of the passages a policy "
        "may be told. Default: the model's, where known.",
    ),
]
Relevance = Annotated[
    bool, typer.Option("--relevance/--no-relevance", help="Tell a policy that reads it how near each passage is.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of the documents drawn, chance and intervals.")]


def register(app: typer.Typer) -> None:
    """Add this family to `refrag`."""
    from refrag_platform.cli.retrieval import retrieval
    from refrag_platform.cli.selection import selection

    family = typer.Typer(no_args_is_help=True, help="Log-perplexity and question answering against controls.")
    family.command("perplexity")(perplexity)
    family.command("rag")(rag)
    family.command("selection")(selection)
    family.command("retrieval")(retrieval)
    app.add_typer(family, name="evaluate")


def perplexity(
    model: Model,
    documents: Annotated[
        Path, typer.Option("--documents", help=".txt, .md, .jsonl or .parquet file, .zst of these, or a folder.")
    ],
    context: Annotated[int, typer.Option("--context", min=1, help="s: context tokens, a multiple of the model's k.")],
    output: Annotated[int, typer.Option("--output", min=16, help="o: tokens predicted after the context.")],
    json: Json,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows over all documents, at most.")] = 64,
    share_kept: Annotated[
        list[float] | None,
        typer.Option(
            "--share-kept",
            min=0,
            max=1,
            help="p: share of chunks that the policy keeps as tokens; give it again for more rows. Default 0.",
        ),
    ] = None,
    controls: Controls = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            help="Recipe whose decoder is judged as it was before training. Default: the model's, where known; else "
            "the model's own decoder stands in.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows at once.")] = 8,
    seed: Seed = 0,
    report: Report = None,
) -> None:
    """Log-perplexity of the first 16, 32, 128 and 512 tokens after a compressed context.

    Systems: full context, no context, the last s/k tokens; REFRAG with its own chunks, with another
    document's, and with zero vectors. Use documents that the model was never trained on. The gap
    recovered between no and full context is given against tuned controls only.
    """
    from refrag_platform.errors import RefragError
    from refrag_platform.evaluation.perplexity import evaluate_perplexity
    from refrag_platform.evaluation.report import perplexity_report
    from refrag_platform.evaluation.stage import write_json, write_reports
    from refrag_platform.evaluation.windows import cut_windows, read_documents

    bundle = _load(model)
    if context % bundle.model.chunk_size:
        raise RefragError(f"--context is {context}; it must be a multiple of the model's k, {bundle.model.chunk_size}")
    found = cut_windows(read_documents(documents, bundle.model.tokenizer), context, output, windows, seed)
    untuned, source = _untuned(model, bundle, recipe)
    result: dict[str, Any] = {
        **evaluate_perplexity(
            bundle.model,
            bundle.policy,
            found,
            untuned=untuned,
            controls=_control_folders(controls),
            shares=share_kept or [0.0],
            batch_size=batch_size,
            seed=seed,
        ),
        "model": model,
        "documents": str(documents),
        "untuned_decoder": source,
        "context_tokens": context,
        "output_tokens": output,
        "seed": seed,
    }
    json.parent.mkdir(parents=True, exist_ok=True)
    write_json(json, result)
    if report:
        write_reports(report, f"Log-perplexity of {model}", perplexity=result)
    typer.echo(perplexity_report(result))


def rag(
    model: Model,
    questions: Annotated[
        list[Path],
        typer.Option(
            "--questions",
            help=".jsonl rows id, question, answers, passages [{title, text}]; or conversations (input, targets, "
            "contexts), or summaries (document, summaries). May be repeated: all questions are judged together, "
            "then each file's.",
        ),
    ],
    json: Json,
    passages: Annotated[str, typer.Option("--passages", help="Numbers of passages, e.g. 1,5,10.")] = "1,5,10",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="This many questions of each file, spread evenly over it.")
    ] = None,
    share_kept: Annotated[
        float | None,
        typer.Option(
            "--share-kept", min=0, max=1, help="p: share of chunks kept as tokens. Default: the policy's budget."
        ),
    ] = None,
    shares: Annotated[
        str, typer.Option("--shares", help="Further p, each with rows of its own, e.g. 0,0.1,0.15,0.25.")
    ] = "",
    systems: Annotated[
        str,
        typer.Option(
            "--systems",
            help="Systems of evaluation/readings.py, or `all`: with plain (as many of the first tokens as REFRAG "
            "reads), pruned (the tokens of most self-information) and untuned (the decoder before any training).",
        ),
    ] = "full,none,truncated,refrag,refrag_wrong",
    retriever: Annotated[
        str,
        typer.Option(
            "--retriever",
            help="listed: in the order listed, gold passages among them; strong: the first, whether gold or not; "
            "weak: random ones of the first 200 in random order, the gold ones among them.",
        ),
    ] = "listed",
    distractors: Annotated[
        Path | None,
        typer.Option(
            "--distractors",
            help="File of passages (title, text); questions with fewer than --passages get random ones of it.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 24,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Questions at once; above 1 no time to first token is measured.")
    ] = 1,
    controls: Controls = None,
    recipe: RecipeFile = None,
    relevance: Relevance = True,
    seed: Seed = 0,
    report: Report = None,
) -> None:
    """Exact match, F1, decoder tokens and time to first token on questions with passages.

    Systems: all passages as text, no passages, the last tokens of the passages (as many positions as
    REFRAG takes), REFRAG, and REFRAG with the passages of another question. Passages are taken in the
    order listed; where a row names its `gold` passages, these are among them.
    """
    from refrag_platform.corpus.question_files import read_passages, retrieved, with_distractors
    from refrag_platform.evaluation.rag import evaluate_rag
    from refrag_platform.evaluation.report import rag_report
    from refrag_platform.evaluation.stage import write_json, write_reports

    counts, further, chosen = _counts(passages), parse_shares(shares), _systems(systems)
    asked = _questions_of(questions, limit)
    rows = [retrieved(question, _retriever(retriever)) for _, question in asked]
    if distractors:
        pool = read_passages(distractors)
        rows = [with_distractors(question, pool, max(counts)) for question in rows]
    bundle = _load(model)
    share = bundle.share_kept if share_kept is None else share_kept
    told = relevance_or_refuse(model, bundle, bundle.policy, recipe) if relevance else None
    found = evaluate_rag(
        bundle.model,
        bundle.policy,
        rows,
        passages=counts,
        share_kept=share,
        shares=further,
        systems=chosen,
        controls=_control_folders(controls),
        untuned=_untuned_or_refuse(model, bundle, recipe) if "untuned" in chosen else None,
        relevance=told,
        sets=[file for file, _ in asked] if len(questions) > 1 else None,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    result: dict[str, Any] = {
        "rows": found.rows,
        "intervals": found.intervals,
        "differences": found.differences,
        "parts": found.parts,
        "answers": found.answers,
        "model": model,
        "questions": ", ".join(map(str, questions)),
        "questions_used": len(rows),
        "retriever": retriever,
        "distractors": str(distractors) if distractors else None,
        "relevance": told is not None,
        "plain_decoder": "controls" if controls else "the model's own",
        "device": str(bundle.model.device),
        "seed": seed,
    }
    json.parent.mkdir(parents=True, exist_ok=True)
    write_json(json, result)
    if report:
        write_reports(report, f"Questions answered by {model}", rag=result)
    typer.echo(rag_report(result))


def _questions_of(files: Sequence[Path], limit: int | None) -> list[tuple[str, Question]]:
    """The questions of each file, with its name."""
    from refrag_platform.corpus.question_files import read_questions
    from refrag_platform.errors import RefragError

    known: dict[Path, Path] = {}
    for file in files:
        if (other := known.setdefault(file.resolve(), file)) is not file:
            raise RefragError(f"--questions names {other} twice (again as {file}); name each file once")
    found = [(str(file), question) for file in files for question in read_questions(file, limit)]
    if len(files) == 1:
        return found
    # A question that names no document is one of its own, whatever it is called in another file.
    return [
        (file, replace(question, document=f"{file}: {question.id}") if question.document == question.id else question)
        for file, question in found
    ]


def _load(model: str) -> Bundle:
    from refrag_platform.model.loading import load_bundle

    return load_bundle(model)


def _untuned(model: str, bundle: Bundle, given: Path | None) -> tuple[PreTrainedModel, str]:
    """The recipe's decoder before training, and its source; the model's own where the recipe is not known."""
    from refrag_platform.evaluation.decoders import untuned_decoder

    known = _known_recipe(model, bundle, given)
    if known is None:
        return bundle.model.decoder, "the model's own, for want of its recipe"
    recipe, base = known
    return untuned_decoder(recipe, base, like=bundle.model), recipe.decoder.source


def _untuned_or_refuse(model: str, bundle: Bundle, given: Path | None) -> PreTrainedModel:
    """The recipe's decoder before training; never another one, under whose name the figures would stand."""
    from refrag_platform.errors import RefragError
    from refrag_platform.evaluation.decoders import untuned_decoder

    known = _known_recipe(model, bundle, given)
    if known is None:
        raise RefragError(f"the system `untuned` needs the recipe of {model}, which isn't known; name it by --recipe")
    return untuned_decoder(*known, like=bundle.model)


def _known_recipe(model: str, bundle: Bundle, given: Path | None) -> tuple[Recipe, Path] | None:
    """The recipe that was given, else the model's, with its folder; None where neither is known."""
    from refrag_platform.evaluation.decoders import recipe_of
    from refrag_platform.recipes import read_recipe

    return (read_recipe(given), given.parent) if given else recipe_of(model, bundle.folder)


def relevance_or_refuse(
    model: str, bundle: Bundle, policy: PolicyNetwork | None, given: Path | None
) -> PassageRelevance | None:
    """What the policy is to be told of passages, if it reads that, by the retriever of the model's recipe."""
    from refrag_platform.errors import RefragError
    from refrag_platform.store.relevance import relevance_for

    if policy is None or not policy.reads_relevance:
        return None
    known = _known_recipe(model, bundle, given)
    if known is None:
        raise RefragError(
            f"the policy of {model} is told how near a retriever finds each passage, and the recipe that names the "
            "retriever isn't known; name it by --recipe, or let the policy do without by --no-relevance"
        )
    return relevance_for(policy, *known, bundle.model.device)


def _control_folders(controls: Path | None) -> dict[PlainSystem, Path]:
    from refrag_platform.evaluation.decoders import control_folders

    return control_folders(controls) if controls else {}


def _counts(passages: str) -> list[int]:
    from refrag_platform.errors import RefragError

    try:
        counts = sorted({int(part) for part in passages.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise RefragError(f"--passages is {passages!r}; give numbers of at least 1, e.g. 1,5,10")
    return counts


def parse_shares(shares: str) -> list[float]:
    from refrag_platform.errors import RefragError

    try:
        found = [float(part) for part in shares.split(",") if part.strip()]
    except ValueError:
        found = [-1.0]
    if not all(0 <= share <= 1 for share in found):
        raise RefragError(f"--shares is {shares!r}; give shares from 0 to 1, e.g. 0,0.1,0.25")
    return found


def _systems(systems: str) -> list[System]:
    from refrag_platform.errors import RefragError
    from refrag_platform.evaluation.readings import SYSTEMS

    named = SYSTEMS if systems == "all" else tuple(part.strip() for part in systems.split(","))
    unknown = [name for name in named if name not in SYSTEMS]
    if unknown:
        raise RefragError(f"--systems names {unknown[0]!r}; allowed are {', '.join(SYSTEMS)}, or all")
    return [system for system in SYSTEMS if system in named]


def _retriever(retriever: str) -> Retriever:
    from refrag_platform.corpus.question_files import RETRIEVERS
    from refrag_platform.errors import RefragError

    for known in RETRIEVERS:
        if retriever == known:
            return known
    raise RefragError(f"--retriever is {retriever!r}; allowed are {', '.join(RETRIEVERS)}")
