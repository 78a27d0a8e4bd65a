"""A small corpus of passages, a tiny random model and the chunk store that the stage makes of them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.stages import StageContext
from refrag_platform.store.build import build_chunks
from tests.conftest import copy_project

PASSAGES = 600
ODD_ID = "d'Ivoire/0"
# Of module and function; run in the background, it may be killed.
BUILD = """
import sys
from pathlib import Path
from refrag_platform.project import Project
from refrag_platform.stages import StageContext
from refrag_platform.store.{} import {} as build

root, folder = map(Path, sys.argv[1:])
project = Project(root)
inputs = {{name: project.content(name, "tiny") for name in ("corpus", "finetuned")}}
recipe = project.recipe("tiny")
build(StageContext(project, recipe, "chunks", inputs, folder / "content", folder / "state", folder))
"""


@dataclass(frozen=True)
class Made:
    """A project whose corpus and fine-tuned model are in place, and the content of its chunk store."""

    project: Project
    model: RefragModel
    content: Path

    def command(self, module: str, function: str, folder: Path, before: str = "") -> list[str]:
        """A process that runs `before`, and builds the store under `folder` by a function of the package `store`."""
        return [sys.executable, "-c", before + BUILD.format(module, function), str(self.project.root), str(folder)]

    def context(self, folder: Path) -> StageContext:
        """A context of the chunks stage that writes under `folder`; one folder is one resumable run."""
        out = folder / "content"
        for path in (out, folder / "state"):
            path.mkdir(parents=True, exist_ok=True)
        inputs = {name: self.project.content(name, "tiny") for name in ("corpus", "finetuned")}
        return StageContext(self.project, self.project.recipe("tiny"), "chunks", inputs, out, folder / "state", folder)


def text_of(number: int) -> str:
    return f"The capital is Town{number}. It has {number * 13} people, who speak Language{number % 7}."


def write_passages(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"c{number}/0" if number else ODD_ID,
            "document_id": f"c{number}",
            "title": f"Country{number}",
            "text": text_of(number),
            "split": "train",
        }
        for number in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "passages.parquet")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    project = copy_project(tmp_path_factory.mktemp("store") / "project")
    write_passages(project.content("corpus", "tiny"), PASSAGES)
    model = RefragModel.create(project.recipe("tiny"), project.recipe_path("tiny").parent).eval()
    finetuned = project.content("finetuned", "tiny")
    finetuned.mkdir(parents=True)
    model.save(finetuned)
    made = Made(project, model, project.content("chunks", "tiny"))
    build_chunks(made.context(project.stage_dir("chunks", "tiny")))
    return made


@pytest.fixture
def build(made: Made, tmp_path: Path) -> Callable[[str], Path]:
    """Build the store once more, into a folder of this test, and return its content."""

    def run(name: str) -> Path:
        context = made.context(tmp_path / name)
        build_chunks(context)
        return context.out

    return run
