"""The evaluation stage, on the corpus' held-out documents and questions: `refrag run evaluation --model NAME`.

Questions are answered over the passages that they list, and over those that the chunk store's search finds for them.

Content holds figures that a second run gives again; times, tables and pictures lie beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refrag_platform.artifacts.manifest import InputRecord
from refrag_platform.corpus.held_out import held_out_questions, looked_up_questions, question_file
from refrag_platform.corpus.question import Question
from refrag_platform.evaluation.decoders import declared_controls, untuned_decoder
from refrag_platform.evaluation.figures import perplexity_figure, rag_figure
from refrag_platform.evaluation.items import FILE_NAME, Items, ItemSet
from refrag_platform.evaluation.perplexity import evaluate_perplexity
from refrag_platform.evaluation.rag import evaluate_rag
from refrag_platform.evaluation.report import perplexity_report, rag_report
from refrag_platform.evaluation.retrieval import IN_STORE
from refrag_platform.evaluation.scoring import PLAIN_SYSTEMS
from refrag_platform.evaluation.seen import seen_in_training
from refrag_platform.evaluation.selection_report import selection_figure, selection_report
from refrag_platform.evaluation.served import evaluate_served
from refrag_platform.evaluation.systems import CONTROL_KINDS, STAGE_SYSTEMS
from refrag_platform.evaluation.windows import split_windows
from refrag_platform.files import write_json, write_text
from refrag_platform.model.loading import load_bundle
from refrag_platform.stages import StageContext
from refrag_platform.store.content import StoreDescription
from refrag_platform.store.relevance import recipe_relevance

REPORTS = {
    "perplexity": ("Log-perplexity", perplexity_report, perplexity_figure),
    "rag": ("Answers", rag_report, rag_figure),
    "selection": ("Choice of chunks", selection_report, selection_figure),
}


def evaluate_stage(context: StageContext) -> dict[str, Any]:
    """Log-perplexity on the test split, answers to the test questions, and what search finds.

    Beside the model's, those of the recipe's controls that are trained.

    Raises:
        ArtifactError: the chunk store was made by another encoder than the fine-tuned model's, or by another retriever.
        RefragError: the test split has no document as long as a window, or no questions; or as `held_out_questions`.
    """
    settings, recipe = context.recipe.evaluation, context.recipe
    bundle = load_bundle(str(context.inputs["finetuned"]), policy=context.inputs["policy"])
    StoreDescription.read(context.inputs["chunks"]).require_encoder(bundle.model.encoder_digest())
    base = context.project.recipe_path(recipe.name).parent
    corpus = context.inputs["corpus"]
    windows = split_windows(
        corpus, "test", settings.context_tokens, settings.output_tokens, settings.windows, recipe.seed
    )
    # p = 0 comes first: it is the one that the gap is counted for.
    shares = sorted({0.0, bundle.share_kept})
    perplexity = evaluate_perplexity(
        bundle.model,
        bundle.policy,
        windows,
        untuned=untuned_decoder(recipe, base, like=bundle.model),
        controls=declared_controls(context.project, recipe, "cpt", PLAIN_SYSTEMS),
        shares=shares,
        batch_size=settings.batch_size,
        seed=recipe.seed,
    )
    relevance = recipe_relevance(recipe, base, bundle.model.device)
    relevance.take_stored(context.inputs["chunks"])
    asked = _questions(context, base)
    looked_up = looked_up_questions(asked, settings, corpus)
    (shown, seen), (_, seen_of_looked_up) = seen_in_training(context.project, recipe, asked, looked_up)
    controls = declared_controls(context.project, recipe, "finetuned", CONTROL_KINDS)
    rag = evaluate_rag(
        bundle.model,
        bundle.policy,
        asked,
        passages=settings.passages,
        share_kept=bundle.share_kept,
        relevance=relevance,
        systems=(*STAGE_SYSTEMS, *(("truncated",) if "truncated" in controls else ())),
        controls=controls,
        seen=[one.seen for one in shown],
        max_new_tokens=settings.max_new_tokens,
        seed=recipe.seed,
    )
    served = evaluate_served(bundle, looked_up, context.inputs["chunks"], recipe, base, relevance)
    perplexity |= {"context_tokens": settings.context_tokens, "output_tokens": settings.output_tokens}
    items = Items(windows=ItemSet(**perplexity.pop("items")), questions=rag.items, retrieval=served.items)
    about = {"order": rag.order, **rag.skipped, "seen": seen, "retrieval": served.report | {"seen": seen_of_looked_up}}
    untimed = [{name: value for name, value in row.items() if name != "ttft_ms"} for row in rag.rows]
    write_json(context.out / "perplexity.json", perplexity)
    write_json(context.out / "rag.json", {"rows": untimed, "intervals": rag.intervals, **about})
    write_json(context.out / FILE_NAME, items.model_dump())
    write_json(context.beside / "answers.json", rag.answers)
    write_json(context.beside / "retrieval_answers.json", served.answers)
    write_reports(
        context.beside, f"Evaluation of {recipe.name}", perplexity=perplexity, rag={"rows": rag.rows, **about}
    )
    return _metrics(perplexity, rag.rows, served.report)


def write_reports(folder: Path, title: str, **results: Mapping[str, Any]) -> None:
    """report.md, report.json and a picture of each result into `folder`.

    Args: results: by their kind, one of REPORTS.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}\n"]
    for kind, result in results.items():
        name, report, draw = REPORTS[kind]
        draw(result, folder / f"{kind}.png")
        parts += [report(result), f"![{name}]({kind}.png)\n"]
    write_text(folder / "report.md", "\n".join(parts))
    write_json(folder / "report.json", results)


def _questions(context: StageContext, base: Path) -> list[Question]:
    """The held-out questions; a file that the recipe names is recorded as a source of the artifact."""
    settings = context.recipe.evaluation
    asked = held_out_questions(settings, context.inputs["corpus"], base)
    if file := question_file(settings, base):
        context.sources.append(InputRecord.of(context.project.root, file, str(file)))
    return asked


def _metrics(perplexity: Mapping[str, Any], rag: list[dict[str, Any]], retrieval: Mapping[str, Any]) -> dict[str, Any]:
    """What manifests and plots show: P128, or the longest there is, answers at most passages, and what search finds."""
    longest = next(name for name in ("P128", "P32", "P16", "P512") if perplexity["rows"][0][name] is not None)
    metrics: dict[str, Any] = {}
    for row in perplexity["rows"]:
        tuned = "_tuned" if row["tuned"] and not row["system"].startswith("refrag") else ""
        metrics.setdefault(f"{longest}_{row['system']}{tuned}", row[longest])
    metrics |= {
        f"gap_recovered_{name}": value for name, value in perplexity["gap_recovered"].items() if value is not None
    }
    most = max(row["passages"] for row in rag)
    for row in rag:
        if row["passages"] in {0, most}:
            metrics |= {
                f"{row['system']}_{name}": row[name] for name in ("exact_match", "f1", "decoder_tokens", "ttft_ms")
            }
    for row in retrieval["lookups"]:
        if row["kind"] == IN_STORE:
            metrics |= {f"retrieval_{name}": value for name, value in row.items() if name != "kind"}
    for row in retrieval["rows"]:
        if row["system"] == "refrag":
            metrics |= {f"retrieval_{name}": row[name] for name in ("exact_match", "f1", "decoder_tokens")}
    return {name: value for name, value in metrics.items() if value is not None}
