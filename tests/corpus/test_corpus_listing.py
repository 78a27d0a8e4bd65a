"""What a source's folder holds: links are followed, each folder is read once, what can't be read is said."""

import os
import socket
from pathlib import Path

import pytest

from refrag_platform.corpus.bad_input import BadInput
from refrag_platform.corpus.files import read_file
from refrag_platform.corpus.listing import find_files
from refrag_platform.corpus.sources import sources_digest
from refrag_platform.project import Project
from refrag_platform.recipes import SourceRecipe
from tests.corpus.conftest import Build
from tests.corpus.test_corpus_build import FILES, facts, splits


def names(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in find_files(folder).files]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "far.txt").write_text("far")
    (tmp_path / "source" / "zone.txt").mkdir(parents=True)
    (tmp_path / "source" / "zone.txt" / "own.txt").write_text("own")
    return tmp_path / "source"


def test_linked_folders_are_read_once_and_cycles_end(folder: Path) -> None:
    for name, target in (("b", "../elsewhere"), ("c", "../elsewhere"), ("loop", "."), ("up", "..")):
        (folder / name).symlink_to(target)
    (folder.parent / "elsewhere" / "back").symlink_to(folder)
    # By its own name where it has one here, else by the first link's.
    (folder / "a").symlink_to("zone.txt")
    assert names(folder) == ["b/deep/far.txt", "zone.txt/own.txt"]
    assert find_files(folder).unusable == []


def test_what_is_no_file_is_told_by_what_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "dangling.txt").symlink_to("no\nwhere")
    (folder / "circle.txt").symlink_to("circle.txt")
    (folder / "null.txt").symlink_to("/dev/null")
    os.mkfifo(folder / "pipe.jsonl")
    monkeypatch.chdir(folder)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.md")
        told = {path.name: why for path, why in find_files(folder).unusable}
    assert told == {
        "dangling.txt": "a link to no\\x0awhere, which is not there",
        "circle.txt": "a link to circle.txt, which is not there",
        "null.txt": "it is a device, not a file",
        "pipe.jsonl": "it is a named pipe, not a file",
        "socket.md": "it is a socket, not a file",
    }
    assert names(folder) == ["zone.txt/own.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_told(folder: Path, tmp_path: Path) -> None:
    bad = BadInput("skip", tmp_path / "log")
    (folder / "zone.txt").chmod(0)
    (folder / "secret.txt").touch(mode=0)
    assert [path.name for path, why in find_files(folder).unusable if "Permission" in why] == ["zone.txt"]
    assert not list(read_file(folder / "secret.txt", "secret.txt", SourceRecipe(kind="files"), bad, lambda count: None))
    assert dict(bad.counts) == {"unreadable_file": 1}
    (folder / "zone.txt").chmod(0o700)


def test_a_file_that_vanishes_or_cannot_be_read_is_told(tmp_path: Path) -> None:
    bad = BadInput("skip", tmp_path / "log")
    for path in (tmp_path / "gone.txt", tmp_path / "loop.txt"):
        if path.name == "loop.txt":
            path.symlink_to(path)
        assert not list(read_file(path, path.name, SourceRecipe(kind="files"), bad, lambda count: None))
    assert dict(bad.counts) == {"unreadable_file": 2}


def test_what_lies_behind_a_link_is_read_recorded_and_watched(
    build: Build, project: Project, texts: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.txt").write_text("Linked text about Oman.")
    (texts / "link").symlink_to(elsewhere)
    (texts / "dangling.txt").symlink_to("nowhere")
    context = build(sources=FILES)
    assert "files/link/linked.txt" in splits(context)
    assert facts(context)["bad_input"] == {"unreadable_file": 1}
    assert "data/sources/tiny/link/linked.txt" in {record.path for record in context.sources}
    before = sources_digest(project, project.recipe("tiny"))
    (elsewhere / "linked.txt").write_text("Another text about Oman.")
    assert before != sources_digest(project, project.recipe("tiny"))
