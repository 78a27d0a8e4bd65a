"""What a working copy of a store holds after failed writes, kills, other releases and restored backups."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from refrag_platform.processes import free_port
from refrag_platform.project import Project
from refrag_platform.serving.engine import Engine
from refrag_platform.store import live as live_module
from refrag_platform.store.edits import EDITS_FILE, Edit, Edits
from refrag_platform.store.live import LiveStore
from tests.command import refrag, refused
from tests.conftest import ROOT
from tests.processes import answers, wait_for
from tests.serving.conftest import COUNTRIES


class Folder:
    """A folder of a working copy, whose store is opened again and again."""

    def __init__(self, path: Path, project: Project, engine: Engine) -> None:
        self.path, self._content, self._model = path, project.content("chunks", "tiny"), engine.bundle.model

    @contextmanager
    def open(self) -> Iterator[LiveStore]:
        store = LiveStore.open_live(self._content, self.path, self._model, 128)
        try:
            yield store
        finally:
            store.close()

    def release(self) -> None:
        """The next store has tables of its own."""
        shutil.rmtree(self.path / "tables")


@pytest.fixture
def folder(packaged_project: Project, engine: Engine, tmp_path: Path) -> Folder:
    return Folder(tmp_path / "live", packaged_project, engine)


def full(*given: object) -> None:
    raise OSError(28, "No space left on device")


def holds(store: LiveStore, *names: str) -> list[bool]:
    return [store.document(name) is not None for name in names]


def test_what_was_exported_stays_deleted_in_the_next_store(folder: Folder) -> None:
    """The next store holds it under an id of its own, here that of a country."""
    with folder.open() as store:
        before = store.description.passages
        store.put([("x", "Peru", COUNTRIES["Peru"]), ("y", "Malta", COUNTRIES["Malta"]), ("z", "", "Muscat.")])
        store.delete("nepal")
    folder.release()
    with folder.open() as store:
        assert holds(store, "x", "peru", "y", "malta", "nepal") == [True, False, True, False, False]
        assert store.search("Muscat", 1)[0].id == "z:0" and store._passages.count_rows() == before
        assert store.delete("x")
        store.put([("y", "Malta", "Malta has another text now.")])
    for _ in range(2):
        folder.release()
        with folder.open() as store:
            assert holds(store, "x", "peru", "y", "malta", "chad") == [False, False, True, False, True]


def test_a_write_that_could_not_be_taken_back_is_applied_before_the_next(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with folder.open() as store:
        with monkeypatch.context() as broken:
            broken.setattr(LiveStore, "_commit", full)
            broken.setattr(Edits, "restore", full)
            for write in (lambda: store.put([("a", "", "Alpha.")]), lambda: store.delete("malta")):
                with pytest.raises(OSError, match="No space"):
                    write()
        store.put([("b", "", "Beta.")])
        assert holds(store, "a", "b") == [True, True]
    with folder.open() as store:
        assert holds(store, "a", "b") == [True, True]
        assert [edit.id for edit in store.edits.all()] == ["a", "b"]


def test_a_write_whose_number_can_not_be_noted_is_done(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder.open() as store:
        with monkeypatch.context() as broken:
            broken.setattr(live_module, "write_text", full)
            store.put([("a", "", "Alpha.")])
        assert store.delete("malta")
    with folder.open() as store:
        assert holds(store, "a", "malta") == [True, False]


def test_copies_are_left_out_though_a_kill_ended_the_first_batch(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with folder.open() as store:
        store.put([("a", "", "First.")])
        store.put([("copy", "", COUNTRIES["Chad"])])
    folder.release()
    real = LiveStore._applied

    def killed(store: LiveStore, number: int) -> None:
        real(store, number)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(live_module, "BATCH_EDITS", 1)
        broken.setattr(LiveStore, "_applied", killed)
        with pytest.raises(KeyboardInterrupt), folder.open():
            pass
    with folder.open() as store:
        assert holds(store, "a", "copy", "chad") == [True, True, False]


def test_new_tables_are_indexed(folder: Folder) -> None:
    with folder.open() as store:
        store.put([(f"d{number}", "", f"Zanzibar spice {number}.") for number in range(20)])
    folder.release()
    with folder.open() as store:
        names = [index.name for index in store._passages.list_indices()]
        assert names and [store._passages.index_stats(name).num_unindexed_rows for name in names] == [0] * len(names)


def test_an_empty_number_means_that_any_edit_may_be_missing(folder: Folder) -> None:
    with folder.open() as store:
        store.put([("a", "", "Alpha.")])
    (applied,) = folder.path.glob("tables/*/applied")
    applied.write_text("")
    with folder.open() as store:
        assert holds(store, "a") == [True] and applied.read_text() == "1\n"


def test_tables_that_are_ahead_of_a_restored_backup_are_made_anew(folder: Folder, tmp_path: Path) -> None:
    with folder.open() as store:
        store.put([("a", "", "Alpha.")])
    shutil.copy(folder.path / EDITS_FILE, tmp_path / "backup")
    with folder.open() as store:
        store.put([("b", "", "Beta.")])
        store.delete("malta")
    shutil.copy(tmp_path / "backup", folder.path / EDITS_FILE)
    with folder.open() as store:
        assert holds(store, "a", "b", "malta") == [True, False, True]


def test_tables_of_another_store_are_removed(folder: Folder) -> None:
    other = folder.path / "tables" / "0123"
    other.mkdir(parents=True)
    with folder.open():
        assert [path.name for path in (folder.path / "tables").glob("[!.]*")] != [] and not other.exists()


def test_edits_survive_a_power_cut_and_are_their_owner_s_alone(tmp_path: Path) -> None:
    edits = Edits(tmp_path / EDITS_FILE)
    assert edits._database.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA
    assert (tmp_path / EDITS_FILE).stat().st_mode & 0o777 == 0o600
    edits.close()


def test_a_page_of_titles(tmp_path: Path) -> None:
    edits = Edits(tmp_path / EDITS_FILE)
    edits.record([Edit("a", "A", "x"), Edit("b", "B", None), Edit("c", "C", "x"), Edit("d", "D", "x")])
    assert edits.titles("a", 1) == [("c", "C")] and edits.titles("c", 9) == [("d", "D")]
    assert [[edit.id for edit in batch] for batch in edits.since(1, 2)] == [["b", "c"], ["d"]]
    edits.close()


def test_a_reader_says_what_a_killed_writer_left(tmp_path: Path) -> None:
    path = tmp_path / EDITS_FILE
    Edits(path).close()
    code = """
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size = 5")
database.execute("BEGIN IMMEDIATE")
for number in range(300):
    database.execute("INSERT INTO edits (id, title, text) VALUES (?, '', ?)", (str(number), "y" * 20_000))
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert "its server was killed while it wrote: start it once" in refused("store", "ls", tmp_path)
    Edits(path).close()
    refrag("store", "ls", tmp_path)


WRITERS = 3
SERVE = """
import sys
from pathlib import Path
import uvicorn
from refrag_platform.project import Project
from refrag_platform.serving.api import create_app
from refrag_platform.serving.engine import Engine

app = create_app("tiny")
app.state.engine = Engine.load(Project(Path(sys.argv[1])), "tiny", Path(sys.argv[2]))
uvicorn.run(app, port=int(sys.argv[3]), log_level="warning", lifespan="off")
"""


@pytest.mark.slow
def test_a_kill_during_writes_loses_nothing_that_was_acknowledged(packaged_project: Project, folder: Folder) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = [sys.executable, "-c", SERVE, str(packaged_project.root), str(folder.path), str(port)]
    process = subprocess.Popen(arguments, env=os.environ | {"PYTHONPATH": str(ROOT)})
    acknowledged: list[int] = []

    def write(writer: int) -> None:
        for number in range(writer, 10_000, WRITERS):
            text = f"Atoll number{number} has a lighthouse."
            try:
                document = {"id": f"atoll-{number}", "text": text}
                assert httpx.post(f"{url}/v1/documents", json={"documents": [document]}, timeout=60).is_success
            except httpx.TransportError:
                return
            acknowledged.append(number)

    try:
        wait_for(lambda: answers(f"{url}/v1/models"), 120)
        with ThreadPoolExecutor(WRITERS) as writers:
            done = [writers.submit(write, writer) for writer in range(WRITERS)]
            wait_for(lambda: len(acknowledged) >= 12, 60)
            os.kill(process.pid, signal.SIGKILL)
        for one in done:
            one.result()
    finally:
        process.kill()
        process.wait()
    assert len(acknowledged) >= 12
    with folder.open() as store:
        for number in acknowledged:
            document = store.document(f"atoll-{number}")
            assert document is not None and document.passages[0][2] == f"Atoll number{number} has a lighthouse."
            assert store.search(f"number{number} lighthouse", 1)[0].document_id == f"atoll-{number}"
        # What was not acknowledged is there whole or not at all.
        edits = Edits(folder.path / EDITS_FILE, read_only=True)
        assert all(store.document(edit.id) is not None for edit in edits.all())
        edits.close()


def test_a_kill_between_record_and_tables_is_made_good(packaged_project: Project, folder: Folder) -> None:
    with folder.open():
        pass
    code = """
import os, sys
from pathlib import Path
from refrag_platform.project import Project
from refrag_platform.serving.engine import Engine
from refrag_platform.store.live import LiveStore

engine = Engine.load(Project(Path(sys.argv[1])), "tiny", Path(sys.argv[2]))
LiveStore._commit = lambda *given: os.kill(os.getpid(), 9)
engine.live.of("").put([("oman", "Oman", "Oman's capital is Muscat.")])
"""
    command = [sys.executable, "-c", code, str(packaged_project.root), str(folder.path)]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    with folder.open() as store:
        assert store.search("Muscat", 1)[0].id == "oman:0"
