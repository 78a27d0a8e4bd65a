"""BentoML's store under the project, and a Bento as a process: start, wait until it is ready, stop.

`home` is the one place that says where models and Bentos lie: $BENTOML_HOME, else PROJECT/.bentoml.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.processes import ends_with_parent, free_port
from refrag_platform.project import Project

if TYPE_CHECKING:
    from bentoml._internal.models import ModelStore

HOST, PORT = "127.0.0.1", 3000
PACKAGE_FILE = "package.json"
BENTO_FILE, MODEL_FILE = "bento.yaml", "model.yaml"
LABEL = ("project", "refrag-platform")
SECONDS_TO_STOP = 10.0


def home(project: Project) -> Path:
    """Where BentoML keeps models and Bentos."""
    folder = os.environ.get("BENTOML_HOME")
    return Path(folder).expanduser().resolve() if folder else project.root / ".bentoml"


def environment(project: Project) -> dict[str, str]:
    """The environment of `bentoml` commands: our store, no usage statistics."""
    return {**os.environ, "BENTOML_HOME": str(home(project)), "BENTOML_DO_NOT_TRACK": "True"}


def model_store(project: Project) -> ModelStore:
    """BentoML's model store for this process.

    BentoML fixes its store at the first use in a process; given explicitly, it is always this project's.
    """
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    from bentoml._internal.models import ModelStore

    return ModelStore(home(project) / "models")


@dataclass(frozen=True)
class Package:
    """package.json: the tags of what the package stage made."""

    model_tag: str
    bento_tag: str

    @classmethod
    def of(cls, project: Project, model: str) -> Package:
        """The package of a model.

        Raises:
            ArtifactError: it has not been made, or its Bento is no longer in the store.
        """
        path = project.content("package", model) / PACKAGE_FILE
        command = f"`refrag run package --model {model}`"
        if not path.is_file():
            raise ArtifactError(f"no Bento of {model} (no {path}); make it with {command}")
        values = json.loads(path.read_text(encoding="utf-8"))
        package = cls(values["model_tag"], values["bento_tag"])
        for kind, tag in (("models", package.model_tag), ("bentos", package.bento_tag)):
            if not store_path(project, kind, tag).is_dir():
                raise ArtifactError(f"{tag} is not in {home(project)}; make it again with {command} --force")
        return package


def store_path(project: Project, kind: str, tag: str) -> Path:
    """The folder of a tag; kind is `models` or `bentos`."""
    name, version = tag.split(":")
    return home(project) / kind / name / version


def bento_models(description: dict[str, Any]) -> list[str]:
    """Tags of the models that a Bento serves, as its bento.yaml names them."""
    entries = [*(description.get("models") or [])]
    for service in description.get("services") or []:
        entries += service.get("models") or []
    return sorted({str(entry["tag"]) for entry in entries})


def read_description(path: Path) -> dict[str, Any] | None:
    """A bento.yaml or model.yaml of this program's; None for others and for damaged ones."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        return None
    ours = isinstance(values, dict) and (values.get("labels") or {}).get(LABEL[0]) == LABEL[1]
    return values if ours else None


def serve_command(tag: str, port: int, host: str = HOST) -> list[str]:
    """`bentoml serve`, bound to this machine only unless `host` says otherwise."""
    return [sys.executable, "-m", "bentoml", "serve", tag, "--host", host, "--port", str(port)]


def worker_command(tag: str, patience: float, listener: int, told: int | None = None) -> list[str]:
    """A Bento on an open socket, by `worker` as a program.

    Args: patience: seconds for running answers after SIGTERM. listener, told: file descriptors, as there.
    """
    command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), tag, "--socket", str(listener)]
    return [*command, "--patience", str(patience), *(() if told is None else ("--told", str(told)))]


@contextlib.contextmanager
def running(
    project: Project, model: str, log: Path, seconds: float = 180.0, variables: Mapping[str, str] | None = None
) -> Iterator[str]:
    """A model's Bento served on a free port of 127.0.0.1 while the context lasts; yields its URL.

    It is ended with all the processes it has started.

    Args: variables: of its environment, over this process's.

    Raises:
        ArtifactError: there is no Bento.
        RefragError: it ended, can't load its model, or was not ready within `seconds`; the message shows the end of
            its log.
    """
    package, port = Package.of(project, model), free_port()
    url = f"http://{HOST}:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            serve_command(package.bento_tag, port),
            env={**environment(project), **(variables or {})},
            cwd=project.root,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=ends_with_parent(signal.SIGTERM),
        )
        try:
            _wait_until_ready(process, url, log, seconds)
            yield url
        finally:
            end(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise RefragError(f"the Bento ended with status {process.returncode}:\n{_end_of(log)}")
        if status_of(f"{url}/readyz") == 200:
            return
        # It goes on answering that its model can't be loaded: a held folder of documents, say.
        if status_of(f"{url}/livez") == 503:
            raise RefragError(f"the Bento can't be served:\n{_end_of(log)}")
        time.sleep(0.2)
    raise RefragError(f"the Bento was not ready within {seconds:g} s:\n{_end_of(log)}")


def status_of(url: str) -> int | None:
    """The status that a server of this machine answers with; None: no answer, it starts or is busy."""
    import httpx

    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, timeout=5, trust_env=False).status_code
    return None


def end(process: subprocess.Popen[bytes], seconds: float = SECONDS_TO_STOP) -> None:
    """Ask a server to end, and after `seconds` make it, with all that it started: each has a session of its own."""
    import psutil

    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    for worker in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    process.wait()


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
