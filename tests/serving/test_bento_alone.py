"""A Bento by itself: served from an empty folder by a Python that has no other copy of this code, and as an image."""

import site
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from refrag_platform.processes import free_port
from refrag_platform.serving import bento
from tests.serving.conftest import Built, server_process

ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "What is the capital of Peru?"}], "max_tokens": 8}

IMAGE = """
import sys
from pathlib import Path

import bentoml
from bentoml._internal.container import construct_containerfile

with construct_containerfile(bentoml.bentos.get(sys.argv[1])) as (folder, dockerfile):
    print(Path(dockerfile).read_text())
    print("--- files")
    print(*sorted(file.relative_to(folder).as_posix() for file in Path(folder).rglob("*")), sep="\\n")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with the packages of this one, without the project, which is installed from the checkout."""
    home = tmp_path_factory.mktemp("python")
    venv.create(home)
    (packages,) = home.glob("lib/python*/site-packages")
    # Of a folder that is named here, files that name further ones are not read: the checkout is named by such a one.
    (packages / "packages.pth").write_text("\n".join(site.getsitepackages()))
    return str(home / "bin" / "python")


def environment(built: Built) -> dict[str, str]:
    """Of `bentoml` commands, naming no folder of code."""
    return {name: value for name, value in bento.environment(built[0]).items() if name != "PYTHONPATH"}


@contextmanager
def served(python: str, built: Built, folder: Path) -> Iterator[str]:
    """`bentoml serve` from this empty folder; yields its URL once it is ready."""
    folder.mkdir()
    port, log = free_port(), folder.with_suffix(".log")
    command = [python, "-P", *bento.serve_command(built[1].bento_tag, port)[1:]]
    with server_process(command, port, folder, log, environment(built)) as (url, _):
        yield url


@pytest.mark.slow
def test_a_bento_is_served_from_an_empty_folder_without_the_checkout(python: str, built: Built, tmp_path: Path) -> None:
    command = [python, "-P", "-c", "import refrag_platform"]
    missing = subprocess.run(command, cwd=tmp_path, env=environment(built), capture_output=True, text=True)
    assert "No module named 'refrag_platform'" in missing.stderr
    with served(python, built, tmp_path / "empty") as url:
        told = httpx.post(f"{url}/v1/chat/completions", json=ASKED | {"model": "tiny"}, timeout=60).json()
        assert told["choices"][0]["message"]["content"] and told["refrag"]["citations"][0]["title"] == "Peru"
        assert "refrag-platform" in httpx.get(url).text
    assert not list((tmp_path / "empty").iterdir())


def test_an_image_is_made_of_the_pins_the_code_and_the_model_with_gpus_or_without(built: Built) -> None:
    """Of what `bentoml containerize` gives to Docker, which isn't needed to see it."""
    project, tags = built

    def told(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=project.root,
            env=bento.environment(project),
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    images = []
    for gpus in (0, 1):
        version = f"gpus-{gpus}"
        chosen = ["--arg", f"gpus={gpus}", "--arg", f"model_tag={tags.model_tag}"]
        told("-m", "bentoml", "build", "--version", version, *chosen)
        folder = bento.home(project) / "bentos" / "refrag" / version
        description = yaml.safe_load((folder / "bento.yaml").read_text())
        assert description["services"][0]["config"]["resources"] == ({"gpu": 1} if gpus else {})
        images.append(told("-c", IMAGE, f"refrag:{version}"))
    # torch brings CUDA's libraries along: whoever starts the image gives it a GPU or doesn't.
    assert images[0] == images[1]
    dockerfile, _, listed = images[0].partition("--- files\n")
    files = listed.splitlines()
    assert f"FROM python:{sys.version_info.major}.{sys.version_info.minor}-slim" in dockerfile
    assert "pip install -r $BENTO_PATH/env/python/requirements.txt" in dockerfile and "COPY" in dockerfile
    assert "USER bentoml" in dockerfile and "env/docker/entrypoint.sh" in dockerfile
    assert {"env/python/requirements.txt", "env/docker/entrypoint.sh"} <= set(files)
    assert "src/refrag_platform/serving/service.py" in files
    name, version = tags.model_tag.split(":")
    assert f"models/{name}/{version}/model/encoder.safetensors" in files
    assert not [file for file in files if file.startswith(("src/tests", "src/data", "src/models"))]
