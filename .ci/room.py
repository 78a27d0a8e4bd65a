"""room.py ROOM: import the code of one extra's room, its deferred imports too, with what is installed here."""

import ast
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

VERSIONS = tuple(f"refrag_platform.{name}" for name in ("artifacts", "history", "lineage", "releases"))
# The packages of each room. `core` is what a bare GPU machine imports; what it defers needs an extra.
ROOMS = {
    "core": (
        *VERSIONS,
        "refrag_platform.bench",
        "refrag_platform.cli",
        "refrag_platform.compact",
        "refrag_platform.decoding",
        "refrag_platform.evaluation",
        "refrag_platform.model",
        "refrag_platform.training",
        "refrag_platform.weights",
    ),
    "corpus": ("refrag_platform.corpus",),
    "store": ("refrag_platform.store",),
    "evaluation": ("refrag_platform.evaluation",),
    "orchestrate": (*VERSIONS, "refrag_platform.quality", "assets"),
    "serve": ("refrag_platform.serving", "refrag_platform.store"),
}
# Of the extras `hub`, `ray` and `s3`, and vLLM, which the user installs: only who asks for them needs them.
OF_OTHER_EXTRAS = {"botocore", "datasets", "ray", "vllm"}
NEEDS_A_MODEL = "refrag_platform.serving.service"


def modules(package: str) -> Iterator[str]:
    """A package and every module in it."""
    yield package
    for found in pkgutil.walk_packages(getattr(importlib.import_module(package), "__path__", []), f"{package}."):
        yield found.name


def imported(module: str) -> set[str]:
    """Top-level names that a module's source imports anywhere, in its functions too."""
    spec = importlib.util.find_spec(module)
    names: set[str] = set()
    if spec is None or spec.origin is None:  # A folder without __init__.py.
        return names
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def main(room: str) -> None:
    found = [module for package in ROOMS[room] for module in modules(package)]
    deferred = set() if room == "core" else set().union(*map(imported, found)) - OF_OTHER_EXTRAS
    for name in [*found, *sorted(deferred)]:
        try:
            importlib.import_module(name)
        except Exception as error:
            # BentoML reads a service from the module that defines it, which therefore looks for its model.
            if name != NEEDS_A_MODEL or "holds no refrag model" not in str(error):
                raise
    print(f"room {room}: {len(found)} modules and {len(deferred)} names import with its own extra alone")


if __name__ == "__main__":
    main(sys.argv[1])
