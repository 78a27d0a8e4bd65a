"""A benchmark as a picture: time to first token and key-value bytes against the context; F1 against that time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from refrag_platform.bench.report import UNRECORDED, system_label, unrecorded
from refrag_platform.evaluation.figures import COLORS as SYSTEM_COLORS
from refrag_platform.evaluation.figures import blank_figure

COLORS = ["#2b5a9c", "#b98a2f", "#9a3b3b", "#6b4c9a", "#3b8a8a"]
FIXED = {"full": "#2f6f4e", "cepe": "#7f8c9b", "prefix": "#444444"}


def latency_figure(result: Mapping[str, Any], path: Path) -> None:
    """Two panels, both axes logarithmic; dashed: the time with encoding."""
    figure, (times, sizes) = blank_figure(2, (6.4, 4.4))
    lines: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in sorted(result["rows"], key=lambda row: row["context"]):
        lines[system_label(row)].append(row)
    colors = iter(COLORS)
    for label, rows in lines.items():
        color = FIXED.get(rows[0]["system"]) or next(colors)
        _line(times, rows, lambda row: row["ttft_cached_ms"] or row["ttft_ms"], "-", color, label)
        _line(times, rows, lambda row: row["ttft_uncached_ms"], "--", color, None)
        _line(sizes, rows, lambda row: row["kv_bytes"] / 2**20, "-", color, label)
    contexts = sorted({row["context"] for row in result["rows"]})
    for axes, name in ((times, "time to first token, ms (dashed: with encoding)"), (sizes, "keys and values, MiB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(name)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    times.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{result['model']}, {result['device']}, {result['dtype']}", fontsize=9)
    _save(figure, path)


def throughput_figure(result: Mapping[str, Any], path: Path) -> None:
    """Bars of tokens per second, each with its batch."""
    figure, (axes,) = blank_figure(1, (6.4, 3.2))
    axes.grid(visible=False)
    labels = [f"{system_label(row)}\nbatch {row['batch']}" for row in result["rows"]]
    axes.barh(labels, [row["tokens_per_second"] for row in result["rows"]], color=COLORS[0])
    axes.invert_yaxis()
    axes.set_xlabel("new tokens per second")
    axes.set_title(f"{result['model']}, {result['device']}, {result['dtype']}", fontsize=9)
    _save(figure, path)


# Where p stands beside a point, in points of print: curves that lie close don't write over each other.
OFFSETS = {"sentences": (-6, 6, "right"), "plain": (-7, -9, "right"), "refrag": (7, -6, "left")}


def frontier_figure(result: Mapping[str, Any], path: Path) -> None:
    """F1 over time to first token: a panel a machine, a curve a system, whose points are p."""
    devices = list(dict.fromkeys(row["device"] for row in result["rows"]))
    several = len({row["k"] for row in result["rows"]}) > 1
    figure, panels = blank_figure(len(devices), (max(6.4, 9.0 / len(devices)), 4.8), sharey=True)
    for axes, device in zip(panels, devices, strict=True):
        curves: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
        for row in result["rows"]:
            if row["device"] == device:
                curves[row["system"], row["k"]].append(row)
        for (system, k), rows in curves.items():
            label = f"{system}, k = {k}" if several else system
            color, width = SYSTEM_COLORS[system], 2.6 if system == "refrag" else 1.4
            points = [(row["ttft_ms"], row["f1"]) for row in rows]
            axes.plot(*zip(*points, strict=True), "-", marker="o", markersize=5, lw=width, color=color, label=label)
            for row, point in zip(rows, points, strict=True):
                share = row["tokens_of"] if row["share_kept"] is None else row["share_kept"]
                if share is not None:
                    right, up, side = OFFSETS[system]
                    place: dict[str, Any] = {"textcoords": "offset points", "xytext": (right, up), "ha": side}
                    axes.annotate(f"{share:g}", point, **place, fontsize=8, color=color)
        axes.set_xlabel("time to first token from the question's arrival, ms")
        axes.set(xlim=(0, 1.08 * axes.dataLim.xmax), ylim=(0, None))
        axes.set_title(device, fontsize=10)
    panels[0].set_ylabel("F1 (up and left is better)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    questions = max(row["questions"] for row in result["rows"])
    title = f"{questions:,} questions over passages that a retriever found; small numbers: p"
    figure.suptitle(title + (f"\n{UNRECORDED}" if unrecorded(result) else ""), fontsize=10)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _line(
    axes: Any,
    rows: list[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], Any],
    style: str,
    color: str,
    label: Any,
) -> None:
    points = [(row["context"], value(row)) for row in rows if value(row) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=color, label=label)
