"""What is typed wrong on the command line, or too early, is named together with the fix."""

import re
import socket

import pytest

from refrag_platform.project import Project
from tests.command import refused

ASK = ["ask", "What is the capital of Oman?"]
UNKNOWN = "no model 'nope'; there are: llama-2-7b, smollm2-135m, tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "--model", "nope"], UNKNOWN),
        (["release", "ls", "nope"], UNKNOWN),
        ([*ASK, "--model", "nope"], UNKNOWN),
        ([*ASK, "--model", "tiny"], "tiny has no fine-tuned model yet; make it: `refrag run all --model tiny`"),
        ([*ASK, "--url", "localhost:3000"], "'localhost:3000'; give it with its scheme, e.g. http://127.0.0.1:3000"),
        (["ask", " "], "the question is empty"),
        (["recipes", "validate", "models/tiny"], "models/tiny is a folder; give the recipe's file, e.g. models/tiny/"),
        (["lineage", "models/tiny/cpt"], "has not been made, .*; make it: `refrag run cpt --model tiny`"),
        (["diff", "runs/tiny~1", "runs/tiny"], "`refrag commit --model NAME` records a run on runs/NAME"),
        (
            [
                "evaluate",
                "perplexity",
                "--model",
                "nope",
                "--documents",
                "d.txt",
                "--context",
                "8",
                "--output",
                "16",
                "--json",
                "out.json",
            ],
            r"no model at 'nope': .*\(models: llama-2-7b, smollm2-135m, tiny\)",
        ),
    ],
)
def test_a_wrong_call_is_refused_with_what_to_do(
    repository: Project, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(repository.root)
    assert re.search(message, re.sub(r"\s+", " ", refused(*arguments)))


def test_a_port_that_is_taken_is_named(repository: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository.root)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("serve", "--model", "tiny", "--port", port)
    assert f"can't listen on 127.0.0.1:{port} (Address already in use); give another by --port" in said
