"""What the UI shows of an artifact: its manifest as numbers and tables, its loss as a picture."""

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import dagster as dg

from assets.docs_server import HOST, PORT
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.corpus.held_out import held_out_questions
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.evaluation.figures import blank_figure
from refrag_platform.lineage.origin import origin
from refrag_platform.project import Project
from refrag_platform.quality.results import DOCS_FOLDER
from refrag_platform.stages import STAGES

Metadata = dict[str, dg.MetadataValue]
# Where assets.docs_server is reached by browsers; by default where `make ui` starts it.
DOCS_URL = "REFRAG_DOCS_URL"
DEFAULT_DOCS_URL = f"http://{HOST}:{PORT}"
ROWS_SHOWN, ANSWERS_SHOWN = 50, 10


@dataclass(frozen=True)
class Published:
    """An artifact in place: its folder (content/, manifest.json and what lies beside) and its manifest."""

    project: Project
    folder: Path
    manifest: Manifest

    @property
    def content(self) -> Path:
        return self.folder / "content"

    @classmethod
    def read(cls, project: Project, stage: str, model: str) -> Self:
        folder = project.stage_dir(stage, model)
        return cls(project, folder, Manifest.read(folder))

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the content."""
        return json.loads((self.content / name).read_text(encoding="utf-8"))


def shown(published: Published, cached: bool, special: Metadata) -> Metadata:
    """All that the UI shows of an artifact, in a reader's order: what came out, what it was made of, how.

    Args: own: what is special about this artifact, its `describe`.
    """
    manifest = published.manifest
    trained = origin(manifest)
    return {
        **({"trained": dg.MetadataValue.text(trained)} if trained else {}),
        **special,
        **numbers(manifest.metrics),
        **_facts(published, cached),
    }


def _facts(published: Published, cached: bool) -> Metadata:
    """What every artifact shows: where it is, its checks' pages, what it was made from, its settings."""
    manifest = published.manifest
    lineage = [
        {"input": name, "path": record.path, "hash": record.hash}
        for name, record in [*manifest.inputs.items(), *(("source", record) for record in manifest.sources)]
    ]
    return {
        "cached": dg.MetadataValue.bool(cached),
        "made": dg.MetadataValue.text(manifest.finished),
        "seconds": dg.MetadataValue.float(float(manifest.seconds)),
        "hardware": dg.MetadataValue.json(manifest.hardware),
        **docs_links(published.project, published.folder),
        "path": dg.MetadataValue.path(published.content),
        "hash": dg.MetadataValue.text(manifest.hash),
        "lineage": table(lineage),
        **neighbours(manifest.stage),
        "commit": dg.MetadataValue.text(manifest.commit or "outside Git"),
        "manifest": dg.MetadataValue.path(published.folder / "manifest.json"),
        "settings": dg.MetadataValue.json(manifest.settings),
    }


def neighbours(stage: str) -> Metadata:
    """Links to the assets that a stage's artifact is made from, and to those that are made from it."""
    links = {"made_from": STAGES[stage].inputs}
    links["goes_into"] = tuple(name for name, other in STAGES.items() if stage in other.inputs)
    return {
        f"{way}.{name}": dg.MetadataValue.asset(dg.AssetKey(name)) for way, names in links.items() for name in names
    }


def docs_links(project: Project, folder: Path) -> Metadata:
    """The Data Docs of the artifact in `folder`: a link, and the file that it shows.

    What is recorded now is looked at later, in a UI that `make ui` starts together with the Data Docs' server: the link
    leads there whether that is up already or not. The file can be opened without any server.
    """
    page = folder / DOCS_FOLDER / "index.html"
    address = os.environ.get(DOCS_URL) or DEFAULT_DOCS_URL
    return {
        "data_docs": dg.MetadataValue.url(f"{address.rstrip('/')}/{quote(page.relative_to(project.root).as_posix())}"),
        "data_docs_file": dg.MetadataValue.path(page),
    }


def answers(published: Published) -> Metadata:
    """Some held-out questions with what was expected and what REFRAG and the full context answered."""
    path = published.folder / "answers.json"
    project, model = published.project, published.manifest.model
    if not path.is_file():
        return {}
    try:
        asked = held_out_questions(
            project.recipe(model).evaluation, project.content("corpus", model), project.recipe_path(model).parent
        )
    except RefragError:
        return {}
    by_question: dict[str, dict[str, str]] = {}
    for row in json.loads(path.read_text(encoding="utf-8")):  # the row with the most passages comes last and stays
        by_question.setdefault(row["id"], {})[row["system"]] = row["answer"]
    rows = [
        {
            "question": one.question,
            "expected": " | ".join(one.answers),
            "refrag": by_question[one.id].get("refrag", ""),
            "full context": by_question[one.id].get("full", ""),
        }
        for one in asked
        if one.id in by_question
    ]
    return {"sample_answers": table(rows[:ANSWERS_SHOWN])} if rows else {}


def side_by_side(published: Published) -> Metadata:
    """The same artifact's figures of every model that has it: one row each."""
    rows = []
    for model in published.project.models():
        try:
            manifest = Manifest.read(published.project.stage_dir(published.manifest.stage, model))
        except ArtifactError:
            continue
        rows.append({"model": model, "made": manifest.finished, **manifest.metrics})
    return {"models": table(rows)}


def numbers(values: Mapping[str, Any], prefix: str = "") -> Metadata:
    """Every number of nested figures under its dotted name: the UI plots them over runs."""
    figures: Metadata = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            figures |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            figures[f"{prefix}{name}"] = dg.MetadataValue.float(float(value))
    return figures


def table(rows: Sequence[Mapping[str, Any]]) -> dg.MetadataValue:
    """Rows as the UI's table; other values than text and numbers are shown as JSON."""
    shown = [{name: _cell(value) for name, value in row.items()} for row in rows[:ROWS_SHOWN]]
    columns = list(dict.fromkeys(name for row in shown for name in row))
    schema = dg.TableSchema([dg.TableColumn(name, _column_type(shown, name)) for name in columns])
    records = [dg.TableRecord({name: row.get(name) for name in columns}) for row in shown]
    return dg.MetadataValue.table(records, schema)


def curve(published: Published, column: str = "loss") -> Metadata:
    """The course of `column` over steps as a picture, and its log as a path; nothing when there is no log."""
    path = published.folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    points = [
        (row["step"], row[column])
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if row.get(column) is not None and "step" in row
    ]
    if not points:
        return {}
    picture = base64.b64encode(_plot(points, column)).decode()
    return {
        f"{column}_curve": dg.MetadataValue.md(f"![{column}](data:image/png;base64,{picture})"),
        "metrics": dg.MetadataValue.path(path),
    }


def _plot(points: Sequence[tuple[float, float]], column: str) -> bytes:
    """A PNG."""
    figure, (axes,) = blank_figure(1, (6, 3))
    axes.plot(*zip(*points, strict=True))
    axes.set(xlabel="step", ylabel=column)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=90)
    return target.getvalue()


def _cell(value: Any) -> str | float | int | bool | None:
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value)


def _column_type(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    kinds = {type(row[name]) for row in rows if row.get(name) is not None}
    if kinds == {bool}:
        return "bool"
    if kinds <= {int, float} and kinds:
        return "int" if kinds == {int} else "float"
    return "string"
