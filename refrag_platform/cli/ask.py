"""`refrag ask`: a question from a shell."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Annotated, Any

import typer

from refrag_platform.cli.options import find_project
from refrag_platform.progress import waiting

Model = Annotated[str, typer.Option("--model", "-m", help="A model of `refrag recipes ls`.")]
DEFAULT_MODEL = "smollm2-135m"

commands = typer.Typer()


@commands.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    model: Model = DEFAULT_MODEL,
    passages: Annotated[
        int | None, typer.Option("--passages", "-n", min=0, help="Passages to retrieve; default the recipe's.")
    ] = None,
    share_kept: Annotated[
        float | None,
        typer.Option("--share-kept", "-p", min=0, max=1, help="Share of chunks kept as tokens; default the recipe's."),
    ] = None,
    rate: Annotated[
        int | None, typer.Option(min=1, help="Chunks read as one: one of the recipe's encoder.rates; default 1.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default the recipe's.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: the likeliest answer.")] = 0.0,
    url: Annotated[
        str | None, typer.Option(help="Ask a running server, e.g. http://127.0.0.1:3000; its key: $REFRAG_API_KEY.")
    ] = None,
) -> None:
    """Answer QUESTION from the model's chunk store, with citations.

    Without --url the fine-tuned model and its store are loaded here; with it a server answers.
    """
    from refrag_platform.corpus.text import is_visible, require_unicode

    # A shell passes on bytes of any encoding.
    require_unicode(question, "the question")
    if not is_visible(question):
        raise typer.BadParameter("the question is empty; give one in quotes")
    if url:
        from refrag_platform.serving import client

        options = {"retrieve": passages, "share_kept": share_kept, "max_tokens": max_tokens, "temperature": temperature}
        extra: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if rate is not None:
            extra["refrag"] = {"rate": rate}
        streamed = client.ask(url, question, None, client.api_key(), **extra)
        _stream(streamed, f"asking {url}")
        _report(streamed.refrag)
        return

    # Libraries and weights take their seconds.
    with waiting(f"loading {model}"):
        from refrag_platform.serving.answers import refrag_body
        from refrag_platform.serving.contract import Message, Sampling
        from refrag_platform.serving.engine import Engine

        engine = Engine.load(find_project(), model)
    count = engine.settings.passages if passages is None else passages
    sampling = Sampling(max_tokens or engine.settings.max_new_tokens, temperature)
    generation = engine.ask([Message("user", question)], count, (), sampling, share_kept, rate=rate or 1)
    _stream(generation, "reading")
    _report(refrag_body(generation.usage, generation.sources))


def _stream(pieces: Iterable[str], until_the_first: str) -> None:
    rest = iter(pieces)
    with waiting(until_the_first):
        first = next(rest, "")
    for piece in chain([first], rest):
        typer.echo(piece, nl=False)
    typer.echo()


def _report(refrag: dict[str, Any]) -> None:
    """Citations and cost, on stderr: stdout holds the answer alone."""
    from refrag_platform.serving.client import cost

    if not {"citations", "answered", "retrieved"} <= refrag.keys():
        typer.echo(
            "this server does not say which passages it read: it is another program, or an older release", err=True
        )
        return
    for number, citation in enumerate(refrag["citations"], start=1):
        typer.echo(f"[{number}] {_passage(citation)}", err=True)
    if not refrag["answered"]:
        near = "nothing was found" if refrag["similarity"] is None else f"similarity {refrag['similarity']:.3f}"
        least = refrag["least_similarity"]
        typer.echo(f"not answered: {near}, serving.least_similarity is {least:g}; found, and not read:", err=True)
    elif refrag["retrieved"]:
        typer.echo("also read, as vectors alone:", err=True)
    for passage in refrag["retrieved"]:
        typer.echo(f"  - {_passage(passage)}", err=True)
    if not refrag["answered"]:
        return
    first = refrag["time_to_first_token_ms"]
    typer.echo(f"{cost(refrag)}, first token after {'-' if first is None else f'{first:.0f}'} ms", err=True)


def _passage(cited: dict[str, Any]) -> str:
    similarity = "" if cited["score"] is None else f", similarity {cited['score']:.3f}"
    return (
        f"{cited['title'] or 'untitled'} ({cited['id']}{similarity}, "
        f"{cited['chunks_expanded']} of {cited['chunks']} chunks expanded): {cited['text'][:100]!r}"
    )
