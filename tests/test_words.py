"""What a user is told: the version, what to do where there is nothing yet, the demo's result in a line."""

import re
import tomllib
from typing import Any

import pytest

from refrag_platform.demo import print_report
from refrag_platform.evaluation.report import beside_full
from refrag_platform.evaluation.served import beside_found
from refrag_platform.project import Project
from tests.command import refrag
from tests.conftest import ROOT

REFRAG = {
    "system": "refrag", "passages": 20, "exact_match": 0.925, "f1": 0.946, "decoder_tokens": 236.0, "ttft_ms": 434.0,
}  # fmt: skip
FULL = REFRAG | {
    "system": "full", "exact_match": 0.8, "decoder_tokens": 942.4, "ttft_ms": 1763.2, "decoder": "own decoder",
}  # fmt: skip
OWN = " (read by REFRAG's own decoder; no control was trained)"
LINE = (
    "REFRAG: exact match 92.5%, 236 decoder positions, first token after 434 ms. "
    f"Full context{OWN}: exact match 80.0%, 942 tokens, first token after 1,763 ms. "
    "(40 held-out questions over 20 passages each)"
)
RETRIEVAL: dict[str, Any] = {
    "passages": 8,
    "lookups": [
        {"kind": "in the store", "questions": 40, "hit_1": 0.85, "hit_5": 0.95, "hit_20": 1.0, "answered": 1.0},
        {"kind": "not in the store", "questions": 160, "hit_1": None, "hit_5": None, "hit_20": None, "answered": 0.25},
    ],
    "rows": [{"system": "full", "f1": 0.9}, {"system": "sentences", "f1": 0.8}, {"system": "refrag", "f1": 0.7}],
}
FOUND = (
    "Looked up as served: of 40 held-out questions that the store can answer, the right passage is among the first 1 "
    "for 85%, 5 for 95%, 20 for 100%. F1 over the first 8: full 0.900, sentences 0.800, refrag 0.700."
)


def test_the_version_is_the_package_s() -> None:
    result = refrag("--version")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert result.stdout == f"refrag-platform {version}\n"


@pytest.mark.parametrize(("arguments", "command"), [([], "promote MODEL"), (["tiny"], "promote tiny")])
def test_no_release_yet_is_said_with_what_to_do(
    repository: Project, monkeypatch: pytest.MonkeyPatch, arguments: list[str], command: str
) -> None:
    monkeypatch.setenv("REFRAG_ROOT", str(repository.root))
    result = refrag("release", "ls", *arguments)
    assert result.stdout == ""
    assert f"`refrag release {command}`" in result.stderr


def test_the_result_beside_full_context_is_one_line() -> None:
    few = [row | {"passages": 1, "exact_match": 0.1} for row in (REFRAG, FULL)]
    assert beside_full([REFRAG, FULL, *few], 40) == LINE


def test_who_read_the_full_context_is_said_unless_a_control_did() -> None:
    by_control, unknown = FULL | {"decoder": "tuned"}, {name: FULL[name] for name in FULL if name != "decoder"}
    assert beside_full([REFRAG, by_control], 40) == LINE.replace(OWN, "")
    assert beside_full([REFRAG, unknown], 40) == LINE


def test_what_the_search_finds_is_one_line() -> None:
    assert beside_found(RETRIEVAL) == FOUND
    assert beside_found(RETRIEVAL | {"rows": []}) is None
    assert beside_found(RETRIEVAL | {"lookups": RETRIEVAL["lookups"][1:]}) is None


def test_without_full_context_or_times_nothing_is_made_up() -> None:
    assert beside_full([REFRAG]) is None
    assert beside_full([REFRAG, FULL | {"passages": 10}]) is None
    untimed = beside_full([row | {"ttft_ms": None} for row in (REFRAG, FULL)])
    assert untimed is not None and "first token" not in untimed


def report(**changes: Any) -> dict[str, Any]:
    made = {
        "artifacts": [
            {
                "name": "finetuned", "path": "models/tiny/finetuned/content", "hash": "0123456789abcdef.dir",
                "checks_passed": 9, "checks_failed": 1, "warnings": ["loss_falls: Training must lower the loss."],
            }
        ],
        "perplexity": [], "rag": [REFRAG, FULL], "seconds": 3.0,
        "training": {"cpt": "1,200 steps; taken as it is from models/tiny/release", "finetuned": "16 steps"},
        "looked_up": FOUND, "summary": LINE,
    }  # fmt: skip
    return made | changes


SERVED: dict[str, Any] = {
    "question": "Which?", "answer": "This.", "citations": [], "ttft_ms": 600.0,
    "refrag": {
        "chunks": 70, "chunks_expanded": 7, "prompt_positions": 155, "plain_prompt_tokens": 565,
        "compression_rate": 3.6452,
    },
}  # fmt: skip


def test_the_demo_ends_with_its_result_and_says_how_the_model_was_trained(capsys: pytest.CaptureFixture[str]) -> None:
    print_report("tiny", report(), SERVED)
    printed = capsys.readouterr().out
    assert printed.rstrip().splitlines()[-1] == LINE
    assert "cpt: 1,200 steps; taken as it is from models/tiny/release" in printed
    assert "undertrained" not in printed
    said = re.search(r"compression ([\d.]+)x: (\d+) positions instead of (\d+) tokens", " ".join(printed.split()))
    assert said and said.groups() == (f"{565 / 155:.2f}", "155", "565")
    assert printed.count(FOUND) == 1
    assert "models/tiny/finetuned/checks/index.html" in printed


def test_the_demo_without_full_context_ends_with_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    print_report("tiny", report(summary=None), SERVED)
    assert "refrag run all --model tiny" in capsys.readouterr().out
