"""`refrag lineage`, `status`, `commit`, `push`, `pull`, `remote`: what is there, what made it, who keeps it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refrag_platform.cli.options import find_project
from refrag_platform.errors import RefragError

if TYPE_CHECKING:
    from rich.tree import Tree

    from refrag_platform.lineage.graph import Graph, Version
    from refrag_platform.lineage.lineage import Node
    from refrag_platform.project import Project

Model = Annotated[str, typer.Option(help="A model, e.g. tiny.")]
AnyModel = Annotated[str | None, typer.Option(help="One model's artifacts only; default: all of them.")]
STATE_COLOURS = {"current": "green", "stale": "yellow", "damaged": "red", "missing": "bright_black"}
WIDTH = 120  # of a line in a pipe; paths and hashes are never broken

commands = typer.Typer()
remote = typer.Typer(name="remote", no_args_is_help=True, help="Where `refrag push` keeps artifacts.")
commands.add_typer(remote)


@commands.command("lineage")
def show_lineage(
    what: Annotated[
        str,
        typer.Argument(
            help="An artifact's folder (models/tiny/finetuned), a release's, a Bento or model (tag or folder), a "
            "source file or a document's id."
        ),
    ],
    down: Annotated[
        bool | None,
        typer.Option("--down/--up", help="What was made from it, or what it was made from; down for sources."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, settings and metrics too, as JSON.")] = False,
    as_dot: Annotated[bool, typer.Option("--dot", help="As a graph in Graphviz's language.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw it into a .png, .svg or .pdf file.")] = None,
) -> None:
    """Print what an artifact or a Bento was made from, down to the source files, or what was made from it.

    Up from an artifact, the manifest.json files are enough. Else all versions are looked at: those in place,
    those committed on runs/NAME or under a tag, and those in BentoML's store.
    """
    from rich.console import Console

    from refrag_platform.lineage.lineage import artifact_folder, find, trace
    from refrag_platform.stages import STAGES

    project, path = _project_of(what), Path(what)
    chain = not (down or as_dot or picture) and path.exists() and artifact_folder(path).name in STAGES
    if chain and project is not None:
        node = trace(project, path)
        if as_json:
            typer.echo(json.dumps(node.plain(), indent=2))
        else:
            Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH).print(_tree(node), crop=False)
        return
    if as_json + as_dot > 1:
        raise RefragError("--json and --dot are two forms of one answer; give one of them")
    named = find(project, what)
    down = named.kind == "source" if down is None else down
    graph = named.graph.after(named.versions) if down else named.graph.behind(named.versions)
    if picture is not None:
        from refrag_platform.lineage.picture import draw

        draw(graph, picture)
        typer.echo(f"drawn into {picture}", err=True)
    if as_json:
        asked = [str(version) for version in named.versions]
        typer.echo(json.dumps({"of": asked, "direction": "down" if down else "up", **graph.plain()}, indent=2))
    elif as_dot:
        from refrag_platform.lineage.picture import dot

        typer.echo(dot(graph))
    elif picture is None:
        _print_graph(graph, set(named.versions), down)


@commands.command("status")
def show_status(model: AnyModel = None) -> None:
    """Show every artifact of every model: current, stale, damaged or missing, its hash and its folder.

    Files are hashed again, so that a damaged one is found. `dvc status` says why one is stale.
    """
    from refrag_platform.history.status import status

    project = find_project()
    if model:
        project.recipe(model)  # an unknown one is refused
    line = "{:<16} {:<16} {:<10} {:<38} {:<9} {}"
    typer.secho(line.format("model", "stage", "state", "hash", "dvc.lock", "path"), bold=True)
    for name in [model] if model else project.models():
        for entry in status(project, name):
            recorded = "recorded" if entry.recorded else ""
            text = line.format(entry.model, entry.stage, entry.state, entry.hash or "", recorded, entry.path)
            typer.secho(text.rstrip(), fg=STATE_COLOURS[entry.state])


@commands.command()
def commit(
    model: Model, message: Annotated[str | None, typer.Option("--message", "-m", help="The commit's message.")] = None
) -> None:
    """Record dvc.lock and a model's manifests in Git, on the branch runs/MODEL.

    Your branch, index and files stay as they are. `refrag push` (or `dvc push`) then copies the artifacts to
    the remote; `git clone -b runs/MODEL` and `refrag pull` (or `dvc pull`) bring all of it back elsewhere.
    """
    from refrag_platform.history.runs import branch, commit_run

    typer.echo(f"{branch(model)}: {commit_run(find_project(), model, message)}")


@commands.command()
def push(model: AnyModel = None) -> None:
    """Copy recorded artifacts to the remote (default ~/.local/share/refrag-platform/dvc)."""
    from refrag_platform.history import dvc

    dvc.push(find_project(), model)


@commands.command()
def pull(model: AnyModel = None) -> None:
    """Fetch recorded artifacts from the remote into their places; changed files there are replaced."""
    from refrag_platform.history import dvc

    dvc.pull(find_project(), model)


@remote.command("set")
def set_remote(
    url: Annotated[str, typer.Argument(help="A folder outside the project, or any URL that DVC knows.")],
) -> None:
    """Choose the remote of this clone; it is kept in .dvc/config.local, not in Git."""
    from refrag_platform.history import dvc

    dvc.set_remote(find_project(), url)


def _tree(root: Node) -> Tree:
    """The chain as a tree; what lies behind an artifact that comes up again is printed once."""
    from rich.markup import escape
    from rich.text import Text
    from rich.tree import Tree

    from refrag_platform.lineage.origin import origin

    printed: set[str] = set()

    def whole(markup: str) -> Text:
        """A line that is not wrapped: its paths and hashes are there to be copied."""
        line = Text.from_markup(markup, overflow="ignore")
        line.no_wrap = True
        return line

    def add(node: Node, tree: Tree) -> None:
        if node.path in printed:
            return
        printed.add(node.path)
        manifest = node.manifest
        if how := origin(manifest):
            tree.add(f"[dim]trained[/] {escape(how)}")
        if manifest.metrics:
            tree.add(f"[dim]metrics[/] {escape(_line(manifest.metrics))}")
        tree.add(whole(f"[dim]commit[/] {manifest.commit or 'none'}  [dim]seed[/] {manifest.seed}"))
        settings = tree.add("[dim]settings[/]")
        for section, values in manifest.settings.items():
            settings.add(f"[dim]{escape(section)}[/] {escape(_line(values))}")
        for source in node.sources:
            note = "  [yellow]changed since[/]" if source.changed else ""
            branch = tree.add(whole(f"[cyan]{escape(source.record.path)}[/] {source.record.hash}{note}"))
            for version in source.behind:
                branch.add(whole(f"[dim]{version.kind}[/] {escape(str(version))}"))
        for below in node.inputs.values():
            add(below, tree.add(title(below)))

    def title(node: Node) -> Text:
        text = f"[bold]{escape(node.path)}[/] {node.recorded}"
        if node.replaced:
            text += f"  [yellow]replaced since, now {node.manifest.hash}[/]"
        return whole(text + ("  [dim](shown above)[/]" if node.path in printed else ""))

    tree = Tree(title(root))
    add(root, tree)
    return tree


def _line(values: Any) -> str:
    """Settings or figures as `name value, name value`: nothing that is empty, figures to five digits."""
    if isinstance(values, dict):
        parts = [(name, value) for name, value in values.items() if value not in (None, {}, [])]
        return ", ".join(f"{name} {_part(value)}" for name, value in parts) or "none"
    return _part(values)


def _part(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_line(value)})"
    if isinstance(value, list):
        return f"[{'; '.join(_part(one) for one in value)}]"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _project_of(what: str) -> Project | None:
    """The project around a path, else around the working directory; None outside any."""
    from refrag_platform.project import Project

    path = Path(what)
    for start in (path if path.is_dir() else path.parent, None):
        try:
            return Project.find(start)
        except RefragError:
            continue
    return None


def _print_graph(graph: Graph, asked: set[Version], down: bool) -> None:
    """A line per version: sources first and Bentos last, or the other way round."""
    layers = graph.layers()
    for layer in layers if down else reversed(layers):
        for version in layer:
            places = graph.versions[version].places
            where = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
            if not where and version.kind != "source":
                where = "no longer here"
            line = f"{version.kind:<9} {version.name:<44} {version.hash:<37} {where}"
            typer.secho(line.rstrip(), bold=version in asked)
