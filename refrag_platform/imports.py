"""Which files of the package a stage runs, read off what they import: a change of one of them makes it stale."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

PACKAGE = "refrag_platform"
# They decide no byte of an artifact: neither they nor what only they import make one stale.
PLUMBING = (
    f"{PACKAGE}/__init__.py",  # the version's number
    f"{PACKAGE}/agreement.py",  # refuses a decoder, or lets it be
    f"{PACKAGE}/artifacts",  # hashes, records and puts into place
    f"{PACKAGE}/compact/card.py",  # the text beside a packed release, which no stage writes
    f"{PACKAGE}/history",  # compares with what there was
    f"{PACKAGE}/lineage",  # looks up what was made from what
    f"{PACKAGE}/project.py",  # where things lie
    f"{PACKAGE}/recipes",  # settings are compared by their values
    f"{PACKAGE}/releases",  # decides which version is served
    f"{PACKAGE}/stages.py",  # the registry
)


def code_files(root: Path, *starts: str, leave_out: Sequence[str] = PLUMBING) -> tuple[str, ...]:
    """The files `starts` and all that running them may import of the package, but for `leave_out`, sorted.

    Args:
        root: the checkout; paths are relative to it. starts: modules, or files that are no Python and import nothing.
    """
    reached: set[str] = set()
    waiting = list(starts)
    while waiting:
        file = waiting.pop()
        if file not in reached and not _lies_in(file, leave_out):
            reached.add(file)
            waiting += _imports(root, file) if file.endswith(".py") else []
    return tuple(sorted(reached))


def _lies_in(file: str, paths: Sequence[str]) -> bool:
    return any(Path(file).is_relative_to(path) for path in paths)


def _imports(root: Path, file: str) -> Iterator[str]:
    """Files of the package that a file imports; of a module in a folder each folder's `__init__.py` too."""
    for name in _imported_names((root / file).read_bytes()):
        path = Path(*name.split("."))
        for part in (path, *path.parents[:-1]):
            for module in (part.with_suffix(".py"), part / "__init__.py"):
                if (root / module).is_file():
                    yield module.as_posix()


@cache
def _imported_names(text: bytes) -> frozenset[str]:
    """Dotted names in the imports of a module's text, its functions' included; those under TYPE_CHECKING don't run."""
    try:
        waiting: list[ast.AST] = [ast.parse(text)]
    except (SyntaxError, ValueError):
        # Whoever runs it is told by Python.
        return frozenset()
    names: set[str] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # What is imported may be a module itself.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)
    return frozenset(name for name in names if name.split(".")[0] == PACKAGE)
