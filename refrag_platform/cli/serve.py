"""`refrag serve`: a model as a service on a port, under BentoML or under uvicorn alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from refrag_platform.cli.ask import DEFAULT_MODEL, Model
from refrag_platform.cli.options import find_project
from refrag_platform.errors import RefragError

commands = typer.Typer()


@commands.command()
def serve(
    model: Model = DEFAULT_MODEL,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 3000,
    host: Annotated[
        str, typer.Option(help="Address to bind; other machines need a key: REFRAG_API_KEY, or `refrag keys`.")
    ] = "127.0.0.1",
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place",
            help="To try a candidate: what is in place, released or not: its Bento or, under uvicorn, its artifacts.",
        ),
    ] = False,
    server: Annotated[
        Literal["bentoml", "uvicorn"], typer.Option(help="uvicorn: in this process, by this code, without BentoML.")
    ] = "bentoml",
    packaged: Annotated[
        Path | None,
        typer.Option(
            help="A packaged model's folder, .bentoml/models/refrag-NAME/VERSION or a copy, served under uvicorn: "
            "needs no project. --model is not looked at."
        ),
    ] = None,
) -> None:
    """Serve a model: an OpenAI-shaped API under /v1, health and metrics beside it.

    That is the released version's Bento; when another is released or rolled back to, it takes over by itself once it
    is ready, and no request fails. Of a model without a release it is the one in place.

    With --server uvicorn it is the same application without BentoML, on the same model; it stays with the version that
    it started with.

    REFRAG_API_KEY asks for a key, REFRAG_API_KEYS_FILE for one of those that `refrag keys` made; REFRAG_RATE_LIMIT
    (requests a minute of each), REFRAG_MAX_BODY (bytes), REFRAG_MAX_WAITING (requests), REFRAG_DEADLINE and, with
    uvicorn, REFRAG_UNREADY (seconds) set limits; REFRAG_STORE names a folder for documents that are added while it
    serves, REFRAG_TABLES an object store with search tables (`refrag store publish`). REFRAG_VLLM=1 has vLLM run the
    decoder.
    """
    import importlib.util
    import os

    from refrag_platform.processes import require_free
    from refrag_platform.serving import bento

    if packaged is not None and in_place:
        raise RefragError("--packaged names a folder and --in-place the project's own artifacts; give one of them")
    require_free(host, port)
    if packaged is not None:
        from refrag_platform.serving.plain import serve_packaged

        return serve_packaged(packaged, host, port)
    project = find_project()
    if server == "uvicorn":
        from refrag_platform.releases.served import package_to_serve
        from refrag_platform.serving.plain import serve_in_place, serve_packaged

        if in_place:
            return serve_in_place(project, model, host, port)
        tag = package_to_serve(project, model).model_tag
        return serve_packaged(bento.store_path(project, "models", tag), host, port)
    if importlib.util.find_spec("bentoml") is None:
        raise RefragError("BentoML is not installed: `pip install bentoml`, or serve without it by `--server uvicorn`")
    if not in_place:
        from refrag_platform.releases.served import serve_released

        raise typer.Exit(serve_released(project, model, port, host, lambda text: typer.echo(text, err=True)))
    command = bento.serve_command(bento.Package.of(project, model).bento_tag, port, host)
    # Replaces this process, so that signals reach BentoML's own supervisor.
    os.execve(command[0], command, bento.environment(project))
