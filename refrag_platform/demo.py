"""The demo's question, answer and report: what the pipeline has made, in figures, as text and as reports/demo.json."""

from __future__ import annotations

import json
import re
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.errors import ArtifactError
from refrag_platform.evaluation.items import Items
from refrag_platform.evaluation.report import CONTROLS, beside_full, figure
from refrag_platform.evaluation.served import beside_found
from refrag_platform.files import write_json
from refrag_platform.lineage.origin import origin
from refrag_platform.progress import waiting
from refrag_platform.project import Project
from refrag_platform.quality.results import DOCS_FOLDER, read_results
from refrag_platform.runner import run_stage
from refrag_platform.serving import bento
from refrag_platform.serving.client import answer_once, cost
from refrag_platform.stages import STAGES

# What a question shows of itself when the corpus has no questions.
OPEN_QUESTION = "What is this collection of documents about?"
NEXT = (
    ("make ui", "the artifacts, their checks and lineage in Dagster: http://127.0.0.1:3001"),
    ("make serve", "the service on http://127.0.0.1:3000, OpenAI-shaped under /v1"),
    (
        "refrag run all --model NAME",
        "on a GPU, with the overrides of NAME in params.yaml set to {}: the same recipe in full",
    ),
)


def held_out_question(project: Project, model: str) -> str:
    """A question about a country the model never saw, whose answer is in the store."""
    path = project.content("corpus", model) / "questions" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    capitals = [row for row in rows if row.get("field") == "capital"]
    return (capitals or rows or [{"question": OPEN_QUESTION}])[0]["question"]


def ask_served(project: Project, model: str, question: str) -> dict[str, Any]:
    """Ask the model's Bento over HTTP; a Bento that was deleted since it was packaged is built again."""
    try:
        bento.Package.of(project, model)
    except ArtifactError:
        run_stage(project, "package", model, force=True)
    # The answer is short, and the report shows it: here a server starts, for half a minute or more.
    with waiting("starting the server and asking it"):
        return answer_once(project, model, question)


def demo_report(project: Project, model: str, served: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the demo found, also written to reports/demo.json.

    Returns: {artifacts: [{name, path, hash, checks_passed, checks_failed, warnings}], perplexity: [rows], rag: [rows],
    question, answer, citations, seconds, training, looked_up, summary}; training: how each checkpoint came to be.
    looked_up: what the store's search finds, and the answers over it, in a line; summary: the answers beside full
    context's, likewise.
    """
    artifacts, training = [], {}
    for name in STAGES:
        folder = project.stage_dir(name, model)
        manifest = Manifest.read(folder)
        if how := origin(manifest):
            training[name] = how
        results = read_results(folder / DOCS_FOLDER)
        passed = sum(result.passed for result in results)
        artifacts.append(
            {
                "name": name,
                "path": (folder / "content").relative_to(project.root).as_posix(),
                "hash": manifest.hash,
                "checks_passed": passed,
                "checks_failed": len(results) - passed,
                "warnings": [f"{result.name}: {result.message}" for result in results if not result.passed],
            }
        )
    evaluation = json.loads((project.stage_dir("evaluation", model) / "report.json").read_text(encoding="utf-8"))
    rows = evaluation["rag"]["rows"]
    report = {
        "artifacts": artifacts,
        "training": training,
        "perplexity": evaluation["perplexity"]["rows"],
        "rag": rows,
        "question": served["question"],
        "answer": served["answer"],
        "citations": served["citations"],
        "seconds": round(seconds, 1),
        "looked_up": beside_found(evaluation["rag"]["retrieval"]),
        "summary": beside_full(rows, len(Items.read(project.content("evaluation", model)).questions.groups)),
    }
    write_json(project.root / "reports" / "demo.json", report, ensure_ascii=False, allow_nan=True)
    return report


def print_report(model: str, report: dict[str, Any], served: dict[str, Any]) -> None:
    """The report for a reader."""
    console = Console(highlight=False)
    console.print()
    _table(
        console,
        "Artifacts",
        ("artifact", "version (DVC)", "checks", "path"),
        [
            (
                row["name"],
                row["hash"][:12],
                f"{row['checks_passed']} passed" + (f", {row['checks_failed']} warn" if row["checks_failed"] else ""),
                row["path"].removesuffix("/content"),
            )
            for row in report["artifacts"]
        ],
    )
    for row in report["artifacts"]:
        for warning in row["warnings"]:
            console.print(f"warning of {row['name']}: {warning}", style="yellow", markup=False)
            page = f"{row['path'].removesuffix('/content')}/{DOCS_FOLDER}/index.html"
            console.print(f"  what was found: {page}", style="yellow", markup=False)
    _table(
        console,
        "Log-perplexity of the first N tokens after the context, in nats (lower is better)",
        ("system", "tuned", "share kept", "P16", "P32", "P128", "windows"),
        [
            (
                row["system"],
                "yes" if row["tuned"] else "no",
                figure(row["share_kept"], 2),
                *(figure(row[key], 3) for key in ("P16", "P32", "P128")),
                str(row["windows"]),
            )
            for row in report["perplexity"]
        ],
    )
    console.print(CONTROLS, style="dim")
    _table(
        console,
        "Held-out questions",
        ("system", "passages", "exact match", "F1", "decoder tokens", "first token, ms"),
        [
            (
                row["system"],
                str(row["passages"]),
                figure(row["exact_match"], 3),
                figure(row["f1"], 3),
                figure(row["decoder_tokens"], 0),
                figure(row["ttft_ms"], 1),
            )
            for row in report["rag"]
        ],
    )
    if report["looked_up"]:
        console.print(report["looked_up"], soft_wrap=True)
    _print_answer(console, served)
    console.print("\nHow the model was trained (docs/log has what longer runs reach):")
    for name, how in report["training"].items():
        console.print(f"  {name}: {how}", markup=False, soft_wrap=True)
    console.print(f"\nDone in {report['seconds']:.0f} s. The report is in reports/demo.json. Next:")
    for command, what in NEXT:
        console.print(f"  [bold]{command.replace('NAME', model)}[/]  {what.replace('NAME', model)}")
    if report["summary"]:
        console.print(f"\n{report['summary']}", style="bold", soft_wrap=True)


def _print_answer(console: Console, served: dict[str, Any]) -> None:
    facts = served["refrag"]
    console.print(f"[bold]Question[/] {served['question']}")
    answer = re.sub(r"\s+", " ", served["answer"]).strip() or "(empty)"
    console.print(f"[bold]Answer[/]   {escape(answer)}")
    for number, citation in enumerate(served["citations"], 1):
        console.print(f"  [{number}] {citation['title'] or 'untitled'} ({citation['id']})", markup=False)
    if not facts.get("answered", True):
        console.print(
            f"Not answered: the nearest passage has similarity {figure(facts['similarity'], 3)}, and "
            f"serving.least_similarity is {facts['least_similarity']:g}"
        )
        return
    console.print(f"{cost(facts)}, first token after {served['ttft_ms'] or 0:.0f} ms over HTTP")


def _table(console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
