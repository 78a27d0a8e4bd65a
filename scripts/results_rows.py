"""Markdown rows of docs/results.md from result files: python scripts/results_rows.py docs/results/FILE...

`--write PAGE` writes a page's tables: what stands between <!-- rows FILE --> and <!-- end -->, or, in few rows,
<!-- headline FILE -->; and draws the pictures that lie beside the files. `make tables` does so for all pages.
A file of selections, log-perplexities, answers or a benchmark is drawn too: --plot FILE.png.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from refrag_platform.bench.figures import frontier_figure, latency_figure, throughput_figure
from refrag_platform.bench.report import headline, result_tables
from refrag_platform.evaluation.figures import perplexity_figure, rag_figure
from refrag_platform.evaluation.report import gain, lookup_table, perplexity_report, rag_report
from refrag_platform.evaluation.selection_report import selection_figure, selection_report
from refrag_platform.files import write_text
from refrag_platform.markdown import table

TRAINING = (
    "step", "loss", "reconstruction_loss", "own_loss", "shuffled_loss", "helper_loss", "vector_std",
    "policy_reward", "random_reward", "reward_spread", "evidence_loss", "answer_kept",
)  # fmt: skip
SCORES = ("P16", "P32", "P128", "P512")
BENCH_FIGURES = {"frontier": frontier_figure, "latency": latency_figure, "throughput": throughput_figure}
# Chunks of the samples that were recovered in a file of choices.
RECONSTRUCTED = (1, 8, 32)
# A document's table with the file it comes from.
MARKED = re.compile(r"<!-- (?P<form>rows|headline) (?P<file>\S+) -->\n.*?<!-- end -->", re.DOTALL)
# Files whose pictures a document shows: of `refrag bench tables`, too.
SHOWN = re.compile(r"<!-- (?:rows|headline|bench) (?P<file>\S+) -->")


def number(value: float | None, form: str = ",.4g") -> str:
    return "–" if value is None else format(value, form)


def bench_rows(result: dict[str, Any]) -> str:
    """A row a loop of `refrag bench train`."""
    rows = [
        [
            row["loop"],
            f"{row['positions_per_second']:,}",
            f"{row['step_seconds'] * 1000:.1f}",
            number(row["mfu"], ".1%"),
            str(row["memory_gb"]),
        ]
        for row in result["rows"]
    ]
    return table(["loop", "positions/s", "ms a step", "MFU", "peak GB"], rows)


def training_rows(lines: list[dict[str, Any]], count: int = 9) -> str:
    """About `count` lines of a metrics.jsonl, evenly spread, the last one among them."""
    names = [name for name in TRAINING if any(name in line for line in lines)]
    stride = max(1, (len(lines) - 1) // (count - 1))
    chosen = [*lines[:-1:stride], lines[-1]]
    return table(names, [[number(line.get(name)) for name in names] for line in chosen])


def recovered_rows(result: dict[str, Any]) -> str:
    """A row for each number of chunks: tokens recovered from their own vectors, and from another sample's."""
    rows = [
        [
            str(row["chunks"]),
            *(number(row.get(key), ".1%") for key in ("teacher_forced", "teacher_forced_shuffled", "greedy")),
        ]
        for row in result["rows"]
    ]
    return table(["chunks", "teacher-forced", "another sample's vectors", "greedy"], rows)


def run_rows(result: dict[str, Any]) -> str:
    """A row a run, of the held-out log-perplexity of some runs alone."""
    rows = [
        [row["run"], f"{row['context']:,}", str(row["windows"]), *(number(row[score], ".3f") for score in SCORES)]
        for row in result["rows"]
    ]
    return table(["run", "context", "windows", *SCORES], rows)


def answer_rows(result: dict[str, Any]) -> str:
    """A row a run and policy that `refrag evaluate rag` judged on the same questions."""
    rows = [
        [row["run"], row["policy"], str(row["questions"]), *(number(row[s], ".3f") for s in ("exact_match", "f1"))]
        for row in result["rows"]
    ]
    return table(["run", "policy", "questions", "exact match", "F1"], rows)


def choice_rows(result: dict[str, Any]) -> str:
    """A row a variant: tokens recovered from 1, 8 and 32 chunks, and log-perplexity after equal CPT."""
    rows = []
    for row in result["rows"]:
        found = {one["chunks"]: one for one in row["reconstruction"] or []}
        each = [found.get(chunks, {}) for chunks in RECONSTRUCTED]
        accuracy = [f"{number(f.get('teacher_forced'), '.1%')} / {number(f.get('greedy'), '.1%')}" for f in each]
        scores = [number((row["cpt"] or {}).get("refrag", {}).get(score), ".3f") for score in SCORES]
        rows.append([row["name"], row["decoder"], str(row["steps"]), *accuracy, *scores])
    return table(["variant", "decoder", "steps", "1 chunk", "8 chunks", "32 chunks", *SCORES], rows)


def paired_rows(result: dict[str, Any], over: str) -> str:
    """A row a number of passages and p: refrag and another system at as many decoder tokens, over all and each file."""
    parts: dict[str, dict[str, Any]] = result.get("parts") or {}
    answered = [row for row in result["rows"] if "exact_match" in row and "passages" in row]
    ours = {_place(row, "share_kept"): row for row in answered if row["system"] == "refrag"}
    theirs = {_place(row, "tokens_of"): row for row in answered if row["system"] == over}
    gains = [_gains(own, over) for own in (result, *parts.values())]
    rows = [
        [
            str(row["passages"]),
            f"{row['share_kept']:g}",
            *(number(row[key], form) for key, form in (("decoder_tokens", ",.0f"), ("compression", ".1f"))),
            number(theirs[place]["f1"], ".3f"),
            number(row["f1"], ".3f"),
            *(own[place] for own in gains),
        ]
        for place, row in sorted(ours.items())
        if place in theirs
    ]
    if not rows:
        raise typer.BadParameter(
            f"--over {over}: the file has no answers of it at as many tokens as refrag; give plain, pruned or truncated"
        )
    names = [f"{name}, {own['questions_used']:,}" for name, own in parts.items()]
    columns = [f"all, {result['questions_used']:,}", *names]
    return table(["passages", "p", "decoder tokens", "compression", f"F1 {over}", "F1 refrag", *columns], rows)


def _place(row: dict[str, Any], share: str) -> tuple[int, float | None]:
    return row["passages"], row.get(share)


def _gains(result: dict[str, Any], over: str) -> dict[tuple[int, float | None], str]:
    own = [row for row in result.get("differences", []) if row.get("over") == over]
    return {_place(row, "share_kept"): gain(row["f1"]) for row in own}


def written(document: Path) -> str:
    """The document with the tables of its marked files, whose paths are relative to it."""

    def rows(marked: re.Match[str]) -> str:
        result = json.loads((document.parent / marked["file"]).read_text(encoding="utf-8"))
        lines = (headline(result) if marked["form"] == "headline" else rows_of(result)[0]).splitlines()
        first = next(place for place, line in enumerate(lines) if line.startswith("|"))
        return f"<!-- {marked['form']} {marked['file']} -->\n" + "\n".join(lines[first:]).strip() + "\n<!-- end -->"

    return MARKED.sub(rows, document.read_text(encoding="utf-8"))


def pictures(document: Path) -> dict[Path, Callable[[Path], None]]:
    """What draws each picture that lies beside a file of the document's marked tables."""
    files = {document.parent / marked["file"] for marked in SHOWN.finditer(document.read_text(encoding="utf-8"))}
    drawn = {}
    for file in sorted(file for file in files if file.with_suffix(".png").is_file()):
        if draw := rows_of(json.loads(file.read_text(encoding="utf-8")))[1]:
            drawn[file.with_suffix(".png")] = draw
    return drawn


def main(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Result files: .json of a command, .jsonl of a training.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the file here (.png).")] = None,
    over: Annotated[
        str | None,
        typer.Option("--over", help="Of answers, a row a setting alone: the gain in F1 over this system, e.g. plain."),
    ] = None,
    write: Annotated[
        list[Path] | None, typer.Option("--write", help="Write this page's marked tables and pictures; again for more.")
    ] = None,
) -> None:
    """Print the Markdown rows of result files."""
    if not files and not write:
        raise typer.BadParameter("name result files, or a document: --write docs/results.md")
    for page in write or []:
        write_text(page, written(page))
        for picture, draw_it in pictures(page).items():
            draw_it(picture)
    for path in files or []:
        text = path.read_text(encoding="utf-8")
        result: dict[str, Any] = {"rows": []}
        if path.suffix == ".jsonl":
            rows, draw = training_rows([json.loads(line) for line in text.splitlines()]), None
        else:
            result = json.loads(text)
            rows, draw = rows_of(result)
        if over:
            rows = paired_rows(result, over)
        if plot and draw is None:
            raise typer.BadParameter(f"--plot: {path} has nothing to draw; leave it out")
        if plot and draw:
            draw(plot)
        print(rows, end="\n\n")


def rows_of(result: dict[str, Any]) -> tuple[str, Callable[[Path], None] | None]:
    """A result's rows, and what draws it, by the fields of its first row; selections and answers share some."""
    first = result["rows"][0]
    if benchmark := result.get("benchmark"):
        return result_tables(result), partial(BENCH_FIGURES[benchmark], result)
    if "alone" in first:
        return lookup_table(result), None
    if "loop" in first:
        return bench_rows(result), None
    if any(row.get("system") == "random" for row in result["rows"]):
        return selection_report(result), partial(selection_figure, result)
    if "teacher_forced" in first:
        return recovered_rows(result), None
    if "policy" in first:
        return answer_rows(result), None
    if "run" in first:
        return run_rows(result), None
    if "name" in first:
        return choice_rows(result), None
    if "exact_match" in first:
        return rag_report(result), partial(rag_figure, result)
    return perplexity_report(result), partial(perplexity_figure, result)


if __name__ == "__main__":
    typer.run(main)
