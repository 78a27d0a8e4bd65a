"""The layers of the house (pyproject.toml, [tool.importlinter]), held by import-linter."""

import subprocess
import sys

import pytest

from refrag_platform.project import Project

LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"


def lint(project: Project) -> tuple[int, str]:
    """The status of import-linter in a checkout, and what it says."""
    result = subprocess.run(
        [sys.executable, "-c", LINT], cwd=project.root, capture_output=True, text=True, check=False, timeout=120
    )
    return result.returncode, result.stdout + result.stderr


def test_imports_run_one_way(project: Project) -> None:
    status, said = lint(project)
    assert status == 0, said


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("model/refrag.py", "import refrag_platform.training.core.loop", "one way BROKEN"),
        ("files.py", "def late():\n    from refrag_platform import names", "one way BROKEN"),
        ("evaluation/metrics.py", "import refrag_platform.evaluation.rag", "in a circle BROKEN"),
        ("progress.py", "import assets.mode", "nothing of Dagster BROKEN"),
        ("unknown.py", "", "one way BROKEN"),
    ],
)
def test_an_arrow_up_a_circle_and_an_unplaced_module_are_refused(
    project: Project, file: str, line: str, broken: str
) -> None:
    with (project.root / "refrag_platform" / file).open("a", encoding="utf-8") as module:
        module.write(f"\n{line}\n")
    status, said = lint(project)
    assert status == 1 and broken in said, said
