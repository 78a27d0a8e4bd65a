"""`refrag evaluate selection`: the policy's choice of chunks against others, on any documents or questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refrag_platform.cli.options import (
    Json,
    Model,
    RecipeFile,
    Relevance,
    Report,
    Seed,
    known_recipe,
    parse_shares,
    relevance_or_refuse,
)
from refrag_platform.errors import RefragError
from refrag_platform.files import write_json

if TYPE_CHECKING:
    from refrag_platform.model.loading import Bundle
    from refrag_platform.model.policy import PolicyNetwork


def selection(
    model: Model,
    json: Json,
    documents: Annotated[
        Path | None, typer.Option(help="Windows of text are judged: a file or folder, as for perplexity.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="Answers are judged: .jsonl rows id, question, answers, passages.")
    ] = None,
    shares: Annotated[str, typer.Option(help="p: shares of chunks kept as tokens.")] = "0.1,0.15,0.25",
    windows: Annotated[int, typer.Option(min=1, help="Windows or questions, at most; spread evenly.")] = 500,
    policies: Annotated[
        list[Path] | None,
        typer.Option(
            "--policy",
            help="Folder with policy.json of a policy for this model; again for more. Default: the model's own.",
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="s of a window, a multiple of the model's k.")] = 1024,
    output: Annotated[int, typer.Option(min=16, help="o: tokens of a window that are judged.")] = 128,
    passages: Annotated[int, typer.Option(min=1, help="Passages of a question.")] = 8,
    distractors: Annotated[
        Path | None,
        typer.Option(
            help="File of passages (rows title, text) for questions with fewer; default: other questions' passages."
        ),
    ] = None,
    answers: Annotated[bool, typer.Option("--answers", help="Also answer the questions: exact match and F1.")] = False,
    draws: Annotated[int, typer.Option(min=1, help="Random choices of each item, averaged.")] = 4,
    oracle: Annotated[
        int,
        typer.Option(
            min=0, help="Items on which the greedy oracle is tried; each takes p L x L readings of the L chunks."
        ),
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Items at once.")] = 16,
    recipe: RecipeFile = None,
    relevance: Relevance = True,
    seed: Seed = 0,
    report: Report = None,
) -> None:
    """The policy's choice of chunks against others of as many: random, by perplexity, by similarity, an oracle.

    Give --documents or --questions that neither the model nor the policy was trained on.
    """
    from refrag_platform.corpus.question_files import read_passages, read_questions
    from refrag_platform.evaluation.selection import evaluate_selection, judged_questions, judged_windows
    from refrag_platform.evaluation.selection_report import selection_report
    from refrag_platform.evaluation.stage import write_reports
    from refrag_platform.evaluation.windows import document_windows
    from refrag_platform.model.loading import load_bundle

    wanted = parse_shares(shares)
    if not wanted or not all(0 < share < 1 for share in wanted):
        raise RefragError(
            f"--shares is {shares!r}; give shares above 0 and below 1, where there is something to choose"
        )
    if (documents is None) == (questions is None):
        raise RefragError("give either --documents, whose windows are judged, or --questions, whose answers are")
    bundle = load_bundle(model)
    networks = _policies(bundle, policies or [])
    if questions:
        # All policies of one model are told the same.
        told = next((policy for policy in networks.values() if policy.reads_relevance), None) if relevance else None
        near = relevance_or_refuse(model, bundle, told, known_recipe(model, bundle, recipe))
        pool = read_passages(distractors) if distractors else None
        judged = judged_questions(bundle.model, read_questions(questions, windows), passages, pool, near)
    elif documents:
        cut = document_windows(documents, bundle.model, context, output, windows, seed)
        judged = judged_windows(bundle.model, cut)
    result: dict[str, Any] = {
        **evaluate_selection(
            bundle.model,
            networks,
            judged,
            shares=wanted,
            draws=draws,
            oracle=oracle,
            answered=answers,
            batch_size=batch_size,
            seed=seed,
        ),
        "model": model,
        "policies": [str(folder) for folder in policies or []],
        "source": str(documents or questions),
        **({"context_tokens": context, "output_tokens": output} if documents else {"passages": passages}),
        "draws": draws,
        "seed": seed,
    }
    write_json(json, result)
    if report:
        write_reports(report, f"Choice of chunks by {model}", selection=result)
    typer.echo(selection_report(result))


def _policies(bundle: Bundle, folders: list[Path]) -> dict[str, PolicyNetwork]:
    """The policies by the names that their rows get."""
    from refrag_platform.model.policy import PolicyNetwork

    if not folders and bundle.policy is not None:
        return {"policy": bundle.policy}
    if not folders:
        raise RefragError(f"{bundle.folder} holds no policy; name one with --policy FOLDER")
    if len(folders) == 1:
        return {"policy": PolicyNetwork.load(folders[0], bundle.model.device)}
    return {f"policy {folder}": PolicyNetwork.load(folder, bundle.model.device) for folder in folders}
