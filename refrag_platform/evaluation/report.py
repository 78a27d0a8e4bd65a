"""An evaluation as Markdown: tables with intervals, and what the figures mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refrag_platform.evaluation.metrics import PREFIXES, prefix_name

COLUMNS = [prefix_name(tokens) for tokens in PREFIXES]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned left, figures right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(value: float | None, digits: int = 3) -> str:
    """A number as tables show it; a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def perplexity_report(result: Mapping[str, Any]) -> str:
    """Log-perplexity, gap recovered and paired gains of `evaluate_perplexity`'s result."""
    intervals = result.get("intervals") or [{}] * len(result["rows"])
    rows = [
        [system_name(row), *(_with_interval(row[name], interval.get(name)) for name in COLUMNS), str(row["windows"])]
        for row, interval in zip(result["rows"], intervals, strict=True)
    ]
    parts = [
        "## Log-perplexity",
        "Mean negative log-likelihood in nats of the first N tokens after the context; lower is better. "
        "In brackets: 95% intervals, documents resampled.",
        table(["system", *COLUMNS, "windows"], rows),
        _gap(result["gap_recovered"]),
    ]
    if result.get("differences"):
        gains = [
            [
                system_name({"system": row["over"], "tuned": row["tuned"]}),
                *(_with_interval(*_split(row[name])) for name in COLUMNS),
            ]
            for row in result["differences"]
        ]
        parts += [
            "Paired gain of refrag in nats, window by window; above zero, refrag is better:",
            table(["over", *COLUMNS], gains),
        ]
    return "\n\n".join(parts) + "\n"


def rag_report(result: Mapping[str, Any]) -> str:
    """Exact match, F1, decoder tokens and, where measured, time to first token."""
    timed = any(row.get("ttft_ms") is not None for row in result["rows"])
    header = ["system", "passages", "exact match", "F1", "decoder tokens", *(["first token, ms"] if timed else [])]
    rows = [
        [
            system_name(row),
            str(row["passages"]),
            figure(row["exact_match"]),
            figure(row["f1"]),
            figure(row["decoder_tokens"], 0),
            *([figure(row.get("ttft_ms"), 1)] if timed else []),
        ]
        for row in result["rows"]
    ]
    return (
        "\n\n".join(
            [
                "## Questions",
                "Greedy answers, SQuAD's normalization, best of several references. Decoder tokens: mean positions of "
                "the prompt. First token: median, chunk vectors made ahead.",
                table(header, rows),
            ]
        )
        + "\n"
    )


def system_name(row: Mapping[str, Any]) -> str:
    """`none (tuned)`, `refrag, p = 0.1`: a row's system as tables and legends show it."""
    share = row.get("share_kept")
    if row["system"].startswith("refrag"):
        return row["system"] + (f", p = {share:g}" if share else "")
    return row["system"] + (" (tuned)" if row.get("tuned") else "")


def _gap(recovered: Mapping[str, float | None]) -> str:
    if all(value is None for value in recovered.values()):
        return "Gap recovered: not given, for want of tuned controls (untuned ones flatter several times)."
    shares = ", ".join(f"{name} {value:.0%}" for name, value in recovered.items() if value is not None)
    return f"Gap recovered between tuned no context (0%) and tuned full context (100%): {shares}."


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    text = figure(value)
    return text if interval is None else f"{text} [{figure(interval[0])}, {figure(interval[1])}]"


def _split(difference: Sequence[float | None] | None) -> tuple[float | None, list[float] | None]:
    """[mean, low, high] as the mean and the interval, either of which may be missing."""
    if difference is None:
        return None, None
    mean, low, high = difference
    return mean, None if low is None or high is None else [low, high]
