"""Any file name becomes text that can be written and printed, and finds its file again."""

import os
import random
import subprocess
from pathlib import Path

import pytest

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.errors import RefragError
from refrag_platform.history import dvc
from refrag_platform.history.status import status
from refrag_platform.names import name_of, name_text, printable
from refrag_platform.project import Project
from refrag_platform.runner import run_stage
from tests.command import refrag, refused
from tests.conftest import init_repository

ODD = (b"caf\xe9 menu.txt", b"two\nlines \x1b[31m.txt", b"back\\slash \\xe9.txt", "turned \u202e txt.md".encode())


def corpus_state(project: Project) -> str:
    return next(entry.state for entry in status(project, "tiny") if entry.stage == "corpus")


def test_every_name_comes_back_from_its_text() -> None:
    chance = random.Random(0)
    parts = [
        b"\xe9",
        b"\\",
        b"x",
        b"u",
        b"e9",
        b"0041",
        b"\n",
        b"\x1b",
        "é".encode(),
        "\u202e\x85".encode(),
        b"\xed\xa0",
    ]
    for _ in range(5000):
        name = b"".join(chance.choices(parts, k=chance.randint(1, 8)))
        text = name_text(os.fsdecode(name))
        assert os.fsencode(name_of(text)) == name
        assert text.encode() and printable(text) == text
    assert name_text("año – 文/日本 😀.txt") == "año – 文/日本 😀.txt"
    assert name_of("an older\\manifest's") == "an older\\manifest's"


def test_bash_reads_the_text_of_a_name_as_the_name() -> None:
    for name in ODD:
        said = subprocess.run(["bash", "-c", f"printf %s $'{name_text(os.fsdecode(name))}'"], capture_output=True)
        assert said.stdout == name


def test_files_of_any_name_go_through_run_status_lineage_and_forget(
    project: Project, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root)
    for number, name in enumerate(ODD):
        Path(os.fsdecode(os.fsencode(texts) + b"/" + name)).write_text(f"Muscat is the capital, number {number}.")
    made = run_stage(project, "corpus", "tiny").manifest
    assert corpus_state(project) == "current"
    recorded = [record.path for record in Manifest.read(project.stage_dir("corpus", "tiny")).sources]
    for name in ODD:
        raw = os.fsdecode(name)
        shown = name_text(raw)
        assert f"data/sources/tiny/{shown}" in recorded
        # As the shell passes it on, as it is printed, and by the document's id.
        for asked in (f"data/sources/tiny/{raw}", f"data/sources/tiny/{shown}", f"files/{shown}"):
            for command in ("forget", "lineage"):
                run = refrag(command, asked)
                assert made.hash in run.output
                assert shown in run.output and "\x1b" not in run.output and raw not in run.output
    (texts / os.fsdecode(ODD[0])).write_text("Changed.")
    assert corpus_state(project) == "stale"


def test_what_an_error_quotes_is_escaped(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    assert "\x1b[31m\udce9" not in refused("status", "--model", "a\x1b[31m\udce9")


def test_a_name_that_no_file_can_have_is_one_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    run = refused("lineage", "a" * 5000)
    assert "File name too long" in run and len(run) < 400


@pytest.mark.parametrize("odd", ["name", "link", "pipe"])
def test_what_dvc_cannot_hash_is_named_before_it_is_asked(project: Project, texts: Path, odd: str) -> None:
    """A pipe would hold it up for ever."""
    path = texts / {"name": os.fsdecode(b"caf\xe9.txt"), "link": "dangling.txt", "pipe": "pipe.txt"}[odd]
    {"name": path.touch, "link": lambda: path.symlink_to("nowhere"), "pipe": lambda: os.mkfifo(path)}[odd]()
    init_repository(project)
    said = {"name": r"caf\\xe9\.txt \(its name", "link": r"dangling\.txt \(a link to nowhere", "pipe": "named pipe"}[
        odd
    ]
    with pytest.raises(RefragError, match=f"DVC can't hash data/sources/tiny/.*{said}"):
        dvc.is_recorded(project, "corpus", "tiny")
