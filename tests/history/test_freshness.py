"""A change of one byte in any file that a stage may import makes it stale; test_real_pipeline sees what really runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from refrag_platform.history.freshness import is_current
from refrag_platform.imports import PLUMBING, code_files
from refrag_platform.project import Project
from refrag_platform.stages import STAGES
from tests.conftest import ROOT
from tests.planted import MODEL, make_all


def add_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("stage", STAGES)
def test_a_change_of_one_byte_in_any_file_that_a_stage_runs_makes_it_stale(recorded: Project, stage: str) -> None:
    files = STAGES[stage].code(recorded.root)
    assert len(files) > 10 and is_current(recorded, stage, MODEL)
    for file in files:
        before = (recorded.root / file).read_bytes()
        add_byte(recorded.root / file)
        assert not is_current(recorded, stage, MODEL), file
        (recorded.root / file).write_bytes(before)
    assert is_current(recorded, stage, MODEL)


def test_plumbing_makes_nothing_stale_but_the_bento_that_holds_it(recorded: Project) -> None:
    for path in PLUMBING:
        there = recorded.root / path
        for file in sorted(there.rglob("*.py")) if there.is_dir() else [there]:
            add_byte(file)
    assert [stage for stage in STAGES if not is_current(recorded, stage, MODEL)] == ["package"]


def test_a_module_that_is_imported_anew_counts_from_then_on(recorded: Project) -> None:
    (recorded.root / "refrag_platform" / "store" / "further.py").write_text("")
    assert is_current(recorded, "chunks", MODEL), "nobody imports it"
    build = recorded.root / "refrag_platform" / "store" / "build.py"
    build.write_text(f"{build.read_text()}\n\ndef late() -> None:\n    import refrag_platform.store.further\n")
    make_all(recorded)
    assert is_current(recorded, "chunks", MODEL)
    add_byte(recorded.root / "refrag_platform" / "store" / "further.py")
    assert not is_current(recorded, "chunks", MODEL)


@pytest.mark.parametrize(
    ("stage", "path"),
    [
        *((stage, "compact/coding.py") for stage in ("reconstruction", "cpt", "policy")),
        ("finetuned", "corpus/swapping.py"),
        ("evaluation", "model/packed.py"),
        ("package", "serving/service.py"),
        ("package", "serving/api.py"),
    ],
)
def test_what_a_stage_imports_in_passing_is_its_code_too(stage: str, path: str) -> None:
    assert f"refrag_platform/{path}" in STAGES[stage].code(ROOT)


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    for name, text in {
        "start": """
import refrag_platform.top as t, os
from typing import TYPE_CHECKING
from refrag_platform.room import CONSTANT
if TYPE_CHECKING:
    import refrag_platform.idle
else:
    import refrag_platform.other
class C:
    def method(self):
        try:
            from refrag_platform.room.inside import function
        except ImportError:
            pass
""",
        "top": "from refrag_platform.history import recorded",
        "room/__init__": "from refrag_platform import passed_on",
        "room/inside": "this is no Python",
        **dict.fromkeys(("idle", "other", "passed_on", "unread", "history/recorded"), ""),
    }.items():
        path = tmp_path / "refrag_platform" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = code_files(tmp_path, "refrag_platform/start.py", "notes.txt")
    named = ("other", "passed_on", "room/__init__", "room/inside", "start", "top")
    assert found == ("notes.txt", *(f"refrag_platform/{name}.py" for name in named))
