"""A change of one byte in any file that a stage runs makes it stale, and what it runs is what it imports."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from refrag_platform.imports import PLUMBING, code_files, is_plumbing
from refrag_platform.project import Project
from refrag_platform.stages import STAGES
from refrag_platform.versioning.freshness import is_current
from tests.conftest import ROOT, copy_project
from tests.versioning.planted import MODEL, make_all, run

# Run in a project: prints the files of the package that ran for a stage, module bodies and functions alike, as far as
# no plumbing called them.
TRACE = """
import json, sys, threading
from pathlib import Path
from types import FrameType
from refrag_platform import runner
from refrag_platform.imports import is_plumbing
from refrag_platform.project import Project

root, (stage, model) = Path.cwd(), sys.argv[1:]
package, ran, stage_function = f"{root}/refrag_platform/", set(), runner.stage_function

def file_of(frame: FrameType) -> str | None:
    path = frame.f_code.co_filename
    return path.removeprefix(f"{root}/") if path.startswith(package) else None

def notice(frame: FrameType, event: str, _: object) -> None:
    file = file_of(frame) if event == "call" else None
    if file is None or file in ran:
        return
    while frame is not None and frame.f_code is not traced.__code__:
        if is_plumbing(file_of(frame) or ""):
            return
        frame = frame.f_back
    ran.add(file)

def traced(context):
    threading.setprofile(notice)
    sys.setprofile(notice)
    try:
        return stage_function(runner.STAGES[stage])(context)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)

runner.stage_function = lambda _: traced
runner.run_stage(Project(root), stage, model)
print(json.dumps(sorted(ran)))
"""


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


def test_plumbing_makes_nothing_stale(recorded: Project) -> None:
    for path in PLUMBING:
        there = recorded.root / path
        for file in sorted(there.rglob("*.py")) if there.is_dir() else [there]:
            add_byte(file)
    assert [stage for stage in STAGES if not is_current(recorded, stage, MODEL)] == []


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
        ("evaluation", "training/core/packed.py"),
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
        "top": "from refrag_platform.versioning import recorded",
        "room/__init__": "from refrag_platform import passed_on",
        "room/inside": "this is no Python",
        **dict.fromkeys(("idle", "other", "passed_on", "unread", "versioning/recorded"), ""),
    }.items():
        path = tmp_path / "refrag_platform" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = code_files(tmp_path, "refrag_platform/start.py", "notes.txt")
    named = ("other", "passed_on", "room/__init__", "room/inside", "start", "top")
    assert found == ("notes.txt", *(f"refrag_platform/{name}.py" for name in named))


@pytest.mark.slow
def test_every_file_that_runs_for_a_stage_is_its_code(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "project")
    for name, stage in STAGES.items():
        ran = json.loads(run(project.root, sys.executable, "-c", TRACE, name, MODEL).splitlines()[-1])
        assert stage.function.split(":")[0].replace(".", "/") + ".py" in ran
        assert [file for file in ran if file not in stage.code(project.root)] == [], name
        assert not [file for file in ran if is_plumbing(file)]
