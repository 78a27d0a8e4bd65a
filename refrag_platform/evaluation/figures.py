"""An evaluation as pictures: log-perplexity by prefix, answers by what the decoder had to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refrag_platform.evaluation.metrics import PREFIXES
from refrag_platform.evaluation.report import system_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By p: lines of one system have one color.
MARKERS = ("o", "s", "^", "D")
COLORS = {
    "full": "#2f6f4e", "none": "#9a3b3b", "truncated": "#b98a2f", "plain": "#6d5ba5", "pruned": "#b0588d",
    "untuned": "#1c1c1c", "first": "#8a5a2b", "sentences": "#c0392b", "kept": "#3b8a8a", "kept+zero": "#a3b86c",
    "kept+other": "#d08c60", "rule": "#6fa8dc", "refrag": "#2b5a9c", "refrag_shuffled": "#7f8c9b",
    "refrag_zero": "#b5b5b5", "refrag_none": "#c98f8f", "refrag_wrong": "#7f8c9b",
}  # fmt: skip


def perplexity_figure(result: Mapping[str, Any], path: Path) -> None:
    """Log-perplexity over the first N tokens, a line per row; untuned controls and rows with p > 0 are dashed."""
    figure, (axes,) = blank_figure(1)
    drawn: list[float] = []
    for row in result["rows"]:
        points = [(tokens, row[name]) for name, tokens in PREFIXES.items() if row[name] is not None]
        if points:
            drawn += [value for _, value in points]
            line = "-" if row["tuned"] and not row["share_kept"] else "--"
            name = system_name(row)
            axes.plot(*zip(*points, strict=True), line, marker="o", color=COLORS[row["system"]], label=name)
    axes.set_xscale("log", base=2)
    ticks = [tokens for name, tokens in PREFIXES.items() if any(row[name] is not None for row in result["rows"])]
    axes.set_xticks(ticks, [str(tokens) for tokens in ticks])
    axes.set_xlabel("tokens after the context")
    axes.set_ylabel("log-perplexity, nats")
    if drawn:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def rag_figure(result: Mapping[str, Any], path: Path) -> None:
    """F1 against decoder tokens, and against time to first token where it was measured.

    Over all questions, over each file's, and over those that were looked up in the chunk store.
    """
    timed = any(row.get("ttft_ms") is not None for row in result["rows"])
    parts: dict[str, Mapping[str, Any]] = dict(result.get("parts") or {})
    if looked_up := (result.get("retrieval") or {}).get("rows"):
        parts["over what the store's search finds"] = {"rows": looked_up}
    figure, axes = blank_figure(1 + len(parts) + timed)
    _against(axes[0], result, "decoder_tokens", "decoder tokens")
    if timed:
        _against(axes[1], result, "ttft_ms", "time to first token, ms")
    for panel, (name, part) in zip(axes[1 + timed :], parts.items(), strict=True):
        _against(panel, part, "decoder_tokens", "decoder tokens")
        panel.set_title(name, fontsize=9)
    if parts:
        axes[0].set_title("all", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _against(axes: Axes, result: Mapping[str, Any], column: str, across_label: str) -> None:
    lines: dict[tuple[str, str, float, bool], list[tuple[float, float, int]]] = defaultdict(list)
    for row in result["rows"]:
        if row.get(column) is not None and row["f1"] is not None:
            share = row.get("share_kept") or row.get("tokens_of") or 0.0
            untuned = row["decoder"] == "untuned" if "decoder" in row else not row.get("tuned", True)
            name = (row["system"], system_name(row), share, not untuned and not share)
            lines[name].append((row[column], row["f1"], row["passages"]))
    shares = sorted({share for _, _, share, _ in lines})
    for (system, label, share, solid), points in lines.items():
        across, up, passages = zip(*points, strict=True)
        marker = MARKERS[shares.index(share) % len(MARKERS)]
        axes.plot(across, up, "-" if solid else "--", marker=marker, color=COLORS[system], label=label)
        for x, y, count in zip(across, up, passages, strict=True):
            axes.annotate(str(count), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xlabel(f"{across_label} (numbers: passages)")
    axes.set_ylabel("F1")
    axes.set_ylim(bottom=0)


def blank_figure(
    panels: int, size: tuple[float, float] = (6.4, 4.2), sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels side by side, with nothing drawn in them yet.

    Args: size: width and height of a panel, in inches. sharey: the panels have one vertical axis.
    """
    # Not pyplot, which keeps global state: a Figure of its own draws with Agg, without a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * panels, size[1]), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False, sharey=sharey)[0])
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes
