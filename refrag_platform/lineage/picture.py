"""A lineage graph for the eye: Graphviz's DOT, or a picture drawn with matplotlib alone."""

from __future__ import annotations

import json
from pathlib import Path

from refrag_platform.errors import RefragError
from refrag_platform.lineage.graph import IN_PLACE, Graph, Version

COLOURS = {"source": "#e8e4d8", "artifact": "#d5e3f3", "release": "#e6dcf0", "model": "#dcefdc", "bento": "#b9dfb9"}
SUFFIXES = (".png", ".svg", ".pdf")
HASH_SHOWN, DPI = 10, 150
BOX_INCHES, ROW_INCHES, BEND = 3.0, 0.75, 0.35


def dot(graph: Graph) -> str:
    """The graph in Graphviz's language; what is no longer in place has a dashed frame."""
    order = [version for layer in graph.layers() for version in layer]
    names = {version: f"n{number}" for number, version in enumerate(order)}
    lines = ["digraph lineage {", "  rankdir=LR;", "  node [shape=box, style=filled];"]
    for version, name in names.items():
        style = "filled" if _here(graph, version) else '"filled,dashed"'
        label, colour = json.dumps(_label(version)), COLOURS[version.kind]
        lines.append(f'  {name} [label={label}, fillcolor="{colour}", style={style}];')
    lines += [f"  {names[origin]} -> {names[product]};" for origin, product in graph.edges()]
    return "\n".join([*lines, "}"])


def draw(graph: Graph, path: Path) -> None:
    """Write the graph as a picture, layers from left (sources) to right (Bentos).

    Raises:
        RefragError: the file's name is not that of a picture, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise RefragError(f"{path}: a picture's name ends in {', '.join(SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise RefragError(
            "pictures need matplotlib; `pip install '.[evaluation]'` in the checkout, or use --dot with Graphviz"
        ) from None
    layers = graph.layers()
    wide = BOX_INCHES * max(map(len, layers), default=1)
    high = ROW_INCHES * max(len(layers), 1)
    bulge = BEND * high / 2
    figure = Figure(figsize=(wide + 2 * bulge, high), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))  # in inches, so that a bend is as wide as it is computed
    axes.set_axis_off()
    axes.set_xlim(-wide / 2 - bulge, wide / 2 + bulge)
    axes.set_ylim(0, high)
    boxes = {}
    for number, layer in enumerate(layers):
        for place, version in enumerate(layer):
            frame = {"linestyle": "solid" if _here(graph, version) else "dashed", "edgecolor": "#555555"}
            boxes[version] = axes.text(
                BOX_INCHES * (place - (len(layer) - 1) / 2),
                high - ROW_INCHES * (number + 0.5),
                _label(version).replace("$", r"\$"),
                bbox={"boxstyle": "round,pad=0.4", "facecolor": COLOURS[version.kind], **frame},
                ha="center",
                va="center",
                fontsize=7,
                family="monospace",
            )
    figure.draw_without_rendering()  # the boxes get their size here, and arrows end at their edges
    for origin, product in graph.edges():
        start, end = boxes[origin].get_position(), boxes[product].get_position()
        # An edge over several layers is bent, so that it does not run through what lies between.
        bend = BEND if start[1] - end[1] > 1.5 * ROW_INCHES else 0.0
        ends = {"patchA": boxes[origin].get_bbox_patch(), "patchB": boxes[product].get_bbox_patch()}
        arrow = {"arrowstyle": "->", "color": "#8a8a8a", "connectionstyle": f"arc3,rad={bend}", **ends}
        axes.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=0)
    figure.savefig(path)


def _label(version: Version) -> str:
    name = version.name if len(version.name) <= 34 else f"…{version.name[-33:]}"
    return f"{name}\n{version.hash[:HASH_SHOWN]}" if version.hash else f"{version.kind} {name}"


def _here(graph: Graph, version: Version) -> bool:
    """Whether a version can still be used where it lies; sources are shown as what was read."""
    return version.kind != "artifact" or IN_PLACE in graph.versions[version].places
