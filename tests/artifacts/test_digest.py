"""The hash of a folder is DVC's own."""

import json
from pathlib import Path

import pytest

from refrag_platform.artifacts.digest import code_digest, folder_digest
from refrag_platform.history import dvc
from refrag_platform.project import Project
from tests.planted import MODEL, record_all

# Sorted as strings "a-b" and "a.txt" stand before "a/b", sorted by folder after it.
ODD_NAMES = (
    "a-b", "a/b", "a.txt", "a b", "a/b.c", "a/b-c", "Z", "ü/é", "日本/😀", 'q"uote', "back\\slash",
    ".hidden/x", ".gitignore", "__pycache__/k.pyc", "work/x", "new\nline", "deep/er/and/deeper",
)  # fmt: skip


def test_a_folder_hashes_as_dvc_hashes_it_whatever_its_files_are_called(repository: Project) -> None:
    content = repository.content("corpus", MODEL)
    for name in ODD_NAMES:
        (content / name).parent.mkdir(parents=True, exist_ok=True)
        (content / name).write_text(name)
    (content / "empty").mkdir()
    (content / "link").symlink_to("a-b")
    record_all(repository, "corpus")
    assert folder_digest(content) == dvc.recorded_hash(repository, "corpus", MODEL)


def test_the_hash_is_that_of_the_listing_in_dvcs_cache(repository: Project) -> None:
    content = repository.content("corpus", MODEL)
    (content / "sub").mkdir(parents=True)
    (content / "sub" / "x").write_bytes(b"\x00" * 3_000_000)
    record_all(repository, "corpus")
    found = folder_digest(content)
    listing = repository.root / ".dvc" / "cache" / "files" / "md5" / found[:2] / found[2:]
    assert [entry["relpath"] for entry in json.loads(listing.read_text())] == ["sub/x"]


@pytest.mark.parametrize("change", ["bytes", "name", "missing"])
def test_any_change_of_a_file_changes_the_folders_hash(tmp_path: Path, change: str) -> None:
    (tmp_path / "x").write_text("1")
    before = folder_digest(tmp_path)
    if change == "bytes":
        (tmp_path / "x").write_text("2")
    elif change == "name":
        (tmp_path / "x").rename(tmp_path / "y")
    else:
        (tmp_path / "x").unlink()
    assert folder_digest(tmp_path) != before


def test_code_counts_by_path_and_bytes_of_its_python_files(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("2")
    paths = ("room", "b.py")
    before = code_digest(tmp_path, paths)
    (tmp_path / "room" / "notes.txt").write_text("not code")
    assert code_digest(tmp_path, paths) == before
    (tmp_path / "room" / "a.py").write_text("3")
    assert code_digest(tmp_path, paths) != before
