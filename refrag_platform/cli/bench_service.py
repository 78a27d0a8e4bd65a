"""`refrag bench service` and `refrag bench faults`: the service over HTTP, under load and under hostile requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refrag_platform.cli.options import Json, find_project, known_recipe
from refrag_platform.errors import RefragError
from refrag_platform.files import write_json

if TYPE_CHECKING:
    from refrag_platform.model.loading import Bundle
    from refrag_platform.recipes import Recipe
    from refrag_platform.serving.engine import Engine

commands = typer.Typer()


@commands.command()
def service(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model of `refrag recipes ls` (fine-tuned), or a model folder.")
    ],
    questions: Annotated[Path, typer.Option(help="A file of questions with passages, which requests bring along.")],
    json: Json,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 32,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of load, on each side.")] = 60.0,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 64,
    share_kept: Annotated[float | None, typer.Option(min=0, max=1, help="p; default: the policy's.")] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Answers written at once; default: the recipe's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take this many questions, spread evenly.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The model's recipe, where it isn't known.")] = None,
) -> None:
    """The service over HTTP beside its engine alone: first token, tokens per second, errors, memory that grows.

    One client first, then all at once, each with a new request as soon as it has its answer. A request brings its
    passages, whose vectors are made then, and has the question's text continued, so that answers are long.
    """
    from refrag_platform.bench.report import service_report
    from refrag_platform.bench.service import ServicePlan, bench_service, fresh_engine
    from refrag_platform.corpus.question_files import read_questions
    from refrag_platform.model.loading import load_bundle

    bundle = load_bundle(model)
    with fresh_engine(bundle, _recipe(model, bundle, recipe), slots) as engine:
        result = bench_service(
            engine, read_questions(questions, limit), ServicePlan(clients, seconds, new_tokens, share_kept)
        )
    write_json(json, result)
    typer.echo(service_report(result))


@commands.command()
def faults(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model of `refrag recipes ls`, with its store, or a model folder.")
    ],
    requests: Annotated[int, typer.Option(min=1, help="Hostile requests, of each kind in turn.")] = 300,
    json: Annotated[Path | None, typer.Option(help="Write the result here: {rows: [...], ...}.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The model's recipe, where it isn't known.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn: the same requests again.")] = 0,
) -> None:
    """The service under requests that no client should send: broken JSON and HTTP, absurd values, clients that leave.

    Served is the model with its chunk store and a working copy of it for documents, in a temporary folder; a model
    folder without a store. An ordinary question is asked before, after each 20 requests and at the end. The command
    fails if one of these is not answered, a request has no answer, or one of 5xx other than 501, 503 and 504.
    """
    from tempfile import TemporaryDirectory

    from refrag_platform.bench.faults import bench_faults, told
    from refrag_platform.bench.report import faults_report

    with (
        TemporaryDirectory(prefix="refrag-faults-") as folder,
        _engine_with_store(model, recipe, Path(folder)) as engine,
    ):
        result = bench_faults(engine, requests, seed)
    if json:
        write_json(json, result)
    typer.echo(faults_report(result))
    if result["failed"]:
        raise RefragError(told(result["failed"]))


@contextmanager
def _engine_with_store(model: str, recipe: Path | None, live: Path) -> Iterator[Engine]:
    """The model's engine; of a project's model with its store, to which documents can be added in the folder `live`."""
    from refrag_platform.bench.service import fresh_engine
    from refrag_platform.model.loading import load_bundle
    from refrag_platform.serving.engine import Engine

    if not Path(model).is_dir():
        engine = Engine.load(find_project(), model, live)
        try:
            yield engine
        finally:
            engine.close()
        return
    bundle = load_bundle(model)
    with fresh_engine(bundle, _recipe(model, bundle, recipe), slots=None) as engine:
        yield engine


def _recipe(model: str, bundle: Bundle, recipe: Path | None) -> Recipe:
    """The model's recipe, for the service's settings.

    Raises:
        RefragError: it isn't known.
    """
    known = known_recipe(model, bundle, recipe)
    if known is None:
        raise RefragError(f"the recipe of {model}, which has the service's settings, isn't known; name it by --recipe")
    return known[0]
