"""What a module imports, read off its text: at its top and in its functions."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = "refrag_platform"


def file_of(module: str) -> Path | None:
    """The file of a module of the package, relative to the checkout."""
    path = Path(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if (ROOT / file).is_file():
            return file
    return None


@cache
def imported(file: Path) -> frozenset[Path]:
    """Files of the package that a file imports when it runs; what stands under TYPE_CHECKING doesn't run."""
    found: set[Path] = set()
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    idle = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
        for body in test.body
        for node in ast.walk(body)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # What is imported may be a module itself.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names if id(node) not in idle else []:
            if name.split(".")[0] == PACKAGE:
                # Packages on the way hold nothing but what they pass on, which is met where it is imported.
                own = file_of(name)
                found |= set() if own is None else {own}
    return frozenset(found)


def reachable(module: str, without: frozenset[str] = frozenset()) -> set[Path]:
    """All files that running a module may import, itself among them; not through files under a path of `without`."""
    start = file_of(module)
    assert start is not None, f"no module {module}"
    found, waiting = set(), [start]
    while waiting:
        file = waiting.pop()
        if file in found or covered(file, without):
            continue
        found.add(file)
        waiting += imported(file)
    return found


def covered(file: Path, paths: frozenset[str]) -> bool:
    """Whether a file is one of the paths or lies in one of them."""
    return any(file.is_relative_to(path) for path in paths)
