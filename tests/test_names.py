"""One name for one thing: no two modules define a class, or a type, of one name."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

# Names that two modules may define, and why.
ALLOWED = {
    "Document": "a source's text for the corpus, and a body of the service's, whose class names it in /openapi.json",
}


def _defined(file: Path) -> Iterator[str]:
    """Classes, and types such as `Kind = Literal[...]`; typer's options and arguments are no types of the library."""
    for statement in ast.parse(file.read_text()).body:
        if isinstance(statement, ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Assign) and "typer." not in ast.unparse(statement.value):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            yield from (name for name in names if name[0].isupper() and not name.isupper())


def test_no_two_modules_define_a_class_or_type_of_one_name() -> None:
    places = defaultdict(set)
    for folder in ("refrag_platform", "assets"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for name in _defined(file):
                places[name].add(str(file.relative_to(ROOT)))
    shared = {name: sorted(files) for name, files in places.items() if len(files) > 1}
    assert sorted(shared) == sorted(ALLOWED), shared
