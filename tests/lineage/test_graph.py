"""`refrag lineage` both ways over all versions: in place, in Git, in BentoML's store."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refrag_platform.cli import app
from refrag_platform.errors import RefragError
from refrag_platform.history import tags
from refrag_platform.history.git import Git
from refrag_platform.history.runs import commit_run
from refrag_platform.lineage.graph import Version
from refrag_platform.lineage.lineage import find
from refrag_platform.project import Project
from refrag_platform.serving import bento
from refrag_platform.stages import STAGES
from tests.command import refrag
from tests.planted import MODEL, make_all
from tests.planted_store import plant_packages

SOURCE = f"data/sources/{MODEL}/notes.txt"


@pytest.fixture
def packaged(planted_project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Every stage made once, a Bento in the store too; the working directory is the project."""
    plant_packages(monkeypatch)
    make_all(planted_project)
    monkeypatch.chdir(planted_project.root)
    return planted_project


def lineage(*arguments: str) -> str:
    return refrag("lineage", *arguments).stdout


def nodes(*arguments: str) -> set[str]:
    return {f"{node['kind']} {node['name']}" for node in json.loads(lineage(*arguments, "--json"))["nodes"]}


def the_bento(project: Project) -> str:
    return str(json.loads((project.content("package", MODEL) / bento.PACKAGE_FILE).read_text())["bento_tag"])


def artifacts(project: Project) -> set[str]:
    return {f"artifact {project.stage_dir(stage, MODEL).relative_to(project.root)}" for stage in STAGES}


def test_a_source_file_leads_down_to_every_checkpoint_and_bento(packaged: Project) -> None:
    tag = the_bento(packaged)
    expected = {f"source {SOURCE}", f"model {tag}", f"bento {tag}"} | artifacts(packaged)
    assert nodes(SOURCE) == nodes(str(packaged.root / SOURCE)) == expected


def test_a_bento_leads_up_to_the_source_files_by_tag_and_by_folder(packaged: Project) -> None:
    tag = the_bento(packaged)
    for name in (tag, str(bento.store_path(packaged, "bentos", tag))):
        found = nodes(name)
        assert f"source {SOURCE}" in found
        assert artifacts(packaged) - found == {f"artifact models/{MODEL}/package"}, "the lock is no part of a Bento"


def test_a_bento_alone_leads_to_the_source_files_without_the_project(
    packaged: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = the_bento(packaged)
    shutil.copytree(bento.home(packaged), tmp_path / "elsewhere")
    shutil.rmtree(packaged.root)
    monkeypatch.chdir(tmp_path)
    assert f"source {SOURCE}" in nodes(str(tmp_path / "elsewhere" / "bentos" / Path(*tag.split(":"))))


def test_down_from_an_artifact_leaves_out_what_it_was_made_from(packaged: Project) -> None:
    tag = the_bento(packaged)
    stages = ("finetuned", "policy", "evaluation", "package")
    assert nodes(f"models/{MODEL}/finetuned", "--down") == {
        f"artifact data/{MODEL}/chunks",
        *(f"artifact models/{MODEL}/{stage}" for stage in stages),
        *(f"{kind} {tag}" for kind in ("model", "bento")),
    }


@pytest.mark.slow
def test_versions_that_were_replaced_are_found_in_git_and_in_the_store(
    recorded: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_packages(monkeypatch)
    (recorded.root / SOURCE).write_text("The river rises in the west.")
    make_all(recorded)
    first = commit_run(recorded, MODEL)
    tags.register(Git(recorded.root), MODEL, first, "first")
    old_bento, old = the_bento(recorded), json.loads((recorded.stage_dir("cpt", MODEL) / "manifest.json").read_text())
    (recorded.root / SOURCE).unlink()
    (recorded.source_dir(MODEL) / "other.txt").write_text("Another river.")
    make_all(recorded)
    found = find(recorded, SOURCE)
    graph = found.graph.after(found.versions)
    assert graph.versions[Version("artifact", f"models/{MODEL}/cpt", old["hash"])].places == [
        f"{MODEL}@v1.0.0",
        f"commit {first[:10]}",
    ]
    assert Version("bento", old_bento) in graph.versions and Version("bento", the_bento(recorded)) not in graph.versions
    assert not [version for version, facts in graph.versions.items() if "in place" in facts.places]


def test_the_text_goes_from_sources_to_bentos_and_back(packaged: Project) -> None:
    down = [line.split()[0] for line in lineage(SOURCE).splitlines()]
    up = [line.split()[0] for line in lineage(the_bento(packaged)).splitlines()]
    assert (down[0], down[-1]) == ("source", "bento")
    assert (up[0], up[-1]) == ("bento", "source")


def test_dot_has_a_box_for_every_version_and_an_arrow_for_every_use(packaged: Project) -> None:
    graph = json.loads(lineage(SOURCE, "--json"))
    text = lineage(SOURCE, "--dot")
    assert text.startswith("digraph lineage {") and text.rstrip().endswith("}")
    assert text.count("[label=") == len(graph["nodes"]) and text.count(" -> ") == len(graph["edges"])
    assert SOURCE in text


def test_a_picture_is_drawn_into_the_file(packaged: Project, tmp_path: Path) -> None:
    lineage(f"models/{MODEL}/finetuned", "--picture", str(tmp_path / "lineage.png"))
    assert (tmp_path / "lineage.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "notes.txt").write_text("mine")
    result = CliRunner().invoke(app, ["lineage", SOURCE, "--picture", str(tmp_path / "notes.txt")])
    assert isinstance(result.exception, SystemExit) and ".png" in result.output
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_nothing_was_made_from_is_refused_with_what_there_is(packaged: Project) -> None:
    (packaged.source_dir(MODEL) / "late.txt").write_text("Dropped in later.")
    with pytest.raises(RefragError, match=rf"no artifact was made from .*{SOURCE}"):
        find(packaged, f"data/sources/{MODEL}/late.txt")
