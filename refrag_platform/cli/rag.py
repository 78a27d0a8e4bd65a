"""`refrag evaluate rag`: answers to questions over passages, REFRAG beside baselines at its decoder tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from refrag_platform.cli.options import (
    Controls,
    Json,
    Model,
    RecipeFile,
    Relevance,
    Report,
    Seed,
    find_project,
    known_controls,
    known_recipe,
    parse_numbers,
    parse_shares,
    relevance_or_refuse,
)
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.systems import CHOOSING_SYSTEMS, CONTROL_KINDS, EXPLAINED, SYSTEMS, TABLE_SYSTEMS, Order
from refrag_platform.files import write_json
from refrag_platform.names import name_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from refrag_platform.corpus.overlap import Overlap
    from refrag_platform.corpus.question import Question
    from refrag_platform.evaluation.systems import System
    from refrag_platform.model.loading import Bundle
    from refrag_platform.recipes import Recipe

# REFRAG beside its baselines: what `--systems` is by default.
TABLE = "table"


def rag(
    model: Model,
    questions: Annotated[
        list[Path],
        typer.Option(
            help=".jsonl rows id, question, answers, passages [{title, text}]; or conversations (input, targets, "
            "contexts), or summaries (document, summaries). May be repeated: all questions are judged together, "
            "then each file's."
        ),
    ],
    json: Json,
    passages: Annotated[str, typer.Option(help="Numbers of passages, e.g. 1,5,10.")] = "1,5,10",
    limit: Annotated[
        int | None, typer.Option(min=1, help="This many questions of each file, spread evenly over it.")
    ] = None,
    share_kept: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="p: share of chunks kept as tokens. Default: the policy's budget."),
    ] = None,
    shares: Annotated[str, typer.Option(help="Further p, each with rows of its own, e.g. 0,0.1,0.15,0.25.")] = "",
    rate: Annotated[
        int,
        typer.Option(
            min=1, help="Chunks that are read as one, by the mean of their vectors: one of the recipe's encoder.rates."
        ),
    ] = 1,
    systems: Annotated[
        str,
        typer.Option(
            help=f"Some of those below with commas between; `{TABLE}`: {', '.join(TABLE_SYSTEMS)}, without those that "
            f"can't be had (no recipe known); or `all`. {'; '.join(f'{name}: {EXPLAINED[name]}' for name in SYSTEMS)}."
        ),
    ] = TABLE,
    order: Annotated[
        Order,
        typer.Option(
            help="In which all systems read the passages. nearest: by the retriever of the recipe, as the policy is "
            "told (as listed where no recipe is known); listed: as the file lists them; shuffled: at random."
        ),
    ] = "nearest",
    retriever: Annotated[
        Literal["listed", "strong", "weak"],
        typer.Option(
            help="Which passages are taken. listed: the first, gold ones among them; strong: the first, whether gold "
            "or not; weak: random ones of the first 200, listed at random, the gold ones among them."
        ),
    ] = "listed",
    distractors: Annotated[
        Path | None,
        typer.Option(
            help="File of passages (title, text); questions with fewer than --passages get random ones of it."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 24,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Questions at once; above 1 no time to first token is measured.")
    ] = 1,
    controls: Controls = None,
    recipe: RecipeFile = None,
    relevance: Relevance = True,
    seed: Seed = 0,
    report: Report = None,
) -> None:
    """Exact match, F1, decoder tokens and time to first token on questions with passages.

    REFRAG beside baselines that read the same passages in the same order, cut to as many decoder tokens.
    Each row says which decoder read it: a tuned control where one was trained for that (of the recipe's
    `controls`, or a folder of that name under --controls), else the model's own. Where a question names
    its `gold` passages, these are read.
    """
    from refrag_platform.corpus.question import retrieved, with_distractors
    from refrag_platform.corpus.question_files import read_passages
    from refrag_platform.evaluation.digests import judged_digests
    from refrag_platform.evaluation.rag import evaluate_rag
    from refrag_platform.evaluation.report import rag_report
    from refrag_platform.evaluation.stage import write_reports
    from refrag_platform.model.loading import load_bundle
    from refrag_platform.store.relevance import recipe_relevance

    counts, further = sorted(set(parse_numbers("--passages", passages))), parse_shares(shares)
    chosen = _systems(systems)
    asked = _questions_of(questions, limit)
    rows = [retrieved(question, retriever) for _, question in asked]
    if distractors:
        pool = read_passages(distractors)
        rows = [with_distractors(question, pool, max(counts)) for question in rows]
    # Where no budget is named it is the policy's.
    asked_of_policy = share_kept is None or (any([share_kept, *further]) and not CHOOSING_SYSTEMS.isdisjoint(chosen))
    bundle = load_bundle(model, choosing=asked_of_policy)
    bundle = replace(bundle, model=bundle.model.at_rate(rate))
    share = bundle.share_kept if share_kept is None else share_kept
    known = known_recipe(model, bundle, recipe)
    near = relevance_or_refuse(model, bundle, bundle.policy, known) if relevance else None
    if near is None and known and (order == "nearest" or "sentences" in chosen):
        near = recipe_relevance(*known, bundle.model.device)
    untuned, left_out = None, dict[str, str]()
    if systems == TABLE and near is None:
        left_out["sentences"] = f"it needs the retriever of {model}'s recipe, which isn't known; name it by --recipe"
    if "untuned" in chosen:
        try:
            untuned = _untuned(model, bundle, known)
        except RefragError as error:
            if systems != TABLE:
                raise
            left_out["untuned"] = str(error)
    chosen = [system for system in chosen if system not in left_out]
    tuned = known_controls(controls, model, bundle, "finetuned", CONTROL_KINDS)
    shown, seen = _seen(model, bundle, [question for _, question in asked])
    evaluation = evaluate_rag(
        bundle.model,
        bundle.policy,
        rows,
        passages=counts,
        share_kept=share,
        shares=further,
        systems=chosen,
        controls=tuned,
        untuned=untuned,
        relevance=near,
        told=relevance,
        order=order,
        sets=[file for file, _ in asked] if len(questions) > 1 else None,
        seen=[one.seen for one in shown] if shown else None,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    result: dict[str, Any] = {
        "rows": evaluation.rows,
        "intervals": evaluation.intervals,
        "differences": evaluation.differences,
        "parts": evaluation.parts,
        "answers": evaluation.answers,
        "model": model,
        "k": bundle.model.chunk_size,
        "rate": rate,
        "questions": ", ".join(map(name_text, questions)),
        **evaluation.skipped,
        "seen": seen,
        "retriever": retriever,
        "distractors": name_text(distractors) if distractors else None,
        "order": evaluation.order,
        "left_out": left_out,
        "relevance": relevance and bundle.policy is not None and bundle.policy.reads_relevance,
        "plain_decoder": "controls" if tuned else "the model's own",
        "device": str(bundle.model.device),
        "seed": seed,
        "digests": judged_digests(bundle, near.digest if near else None, questions),
    }
    write_json(json, result)
    if report:
        write_reports(report, f"Questions answered by {model}", rag=result)
    typer.echo(rag_report(result))


def _questions_of(files: Sequence[Path], limit: int | None) -> list[tuple[str, Question]]:
    """The questions of each file, with its name."""
    from refrag_platform.corpus.question_files import read_questions

    known: dict[Path, Path] = {}
    for file in files:
        if (other := known.setdefault(file.resolve(), file)) is not file:
            raise RefragError(f"--questions names {other} twice (again as {file}); name each file once")
    asked = [(name_text(file), question) for file in files for question in read_questions(file, limit)]
    if len(files) == 1:
        return asked
    # A question that names no document is one of its own, whatever it is called in another file.
    return [
        (file, replace(question, document=f"{file}: {question.id}") if question.document == question.id else question)
        for file, question in asked
    ]


def _seen(model: str, bundle: Bundle, asked: Sequence[Question]) -> tuple[list[Overlap], dict[str, Any] | None]:
    """What the training of a project's own model has shown of these questions; of another's nothing is known."""
    from refrag_platform.evaluation.decoders import recipe_of
    from refrag_platform.evaluation.seen import seen_in_training

    known = recipe_of(model, bundle.folder)
    return seen_in_training(find_project(), known[0], asked)[0] if known else ([], None)


def _untuned(model: str, bundle: Bundle, known: tuple[Recipe, Path] | None) -> PreTrainedModel:
    """The recipe's decoder before training; never another one, under whose name the figures would stand."""
    from refrag_platform.evaluation.decoders import untuned_decoder

    if known is None:
        raise RefragError(f"the system `untuned` needs the recipe of {model}, which isn't known; name it by --recipe")
    if not bundle.model.tokenizer.chat_template:
        raise RefragError(
            f"the tokenizer of {model}'s decoder has no chat template, which `untuned` is asked in: leave it out"
        )
    return untuned_decoder(*known, like=bundle.model)


def _systems(systems: str) -> list[System]:
    groups: dict[str, tuple[str, ...]] = {TABLE: TABLE_SYSTEMS, "all": SYSTEMS}
    named = groups.get(systems) or tuple(part.strip() for part in systems.split(","))
    unknown = [name for name in named if name not in SYSTEMS]
    if unknown:
        raise RefragError(f"--systems names {unknown[0]!r}; allowed are {', '.join(SYSTEMS)}, or table, or all")
    return [system for system in SYSTEMS if system in named]
