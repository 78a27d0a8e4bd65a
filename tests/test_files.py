"""Files that appear whole, and locks."""

from pathlib import Path

import pytest

from refrag_platform.files import lock_file, partial_path, whole, whole_by_many, write_json, write_text


def test_a_file_or_folder_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with whole(target) as partial:
        assert partial == partial_path(target)
        partial.mkdir()
        (partial / "first").touch()
        assert not target.exists()
    with pytest.raises(OSError, match="disk"), whole(target) as partial:
        partial.mkdir()
        raise OSError("the disk is full")
    with whole(target) as partial:
        write_text(partial / "second", "replaces the first")
    assert [path.name for path in target.iterdir()] == ["second"] and list(target.parent.iterdir()) == [target]


def test_what_a_killed_process_left_is_cleared_or_brought_back(tmp_path: Path) -> None:
    """A kill may come while `made` is written, or between the two renames that replace it."""
    for left in (".made.partial", ".made.old"):
        write_text(tmp_path / left / left, "")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "made") as partial:
        assert not partial.exists()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["made", ".made.old"]


def test_of_several_that_make_a_file_at_once_whoever_ends_last_has_written_it(tmp_path: Path) -> None:
    target = tmp_path / "part"
    with whole_by_many(target) as slower:
        slower.write_text("slower")
        with whole_by_many(target) as faster:
            faster.write_text("faster")
        assert target.read_text() == "faster"
    assert target.read_text() == "slower"
    with pytest.raises(OSError, match="disk"), whole_by_many(target) as partial:
        partial.touch()
        raise OSError("the disk is full")
    assert list(tmp_path.iterdir()) == [target]


def test_json_is_refused_before_anything_is_replaced(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "é"}, sort_keys=True, ensure_ascii=False)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", [float("nan")])
    assert (tmp_path / "a.json").read_text() == '{\n  "a": "é",\n  "b": 1\n}\n'


def test_a_lock_is_held_until_it_is_closed(tmp_path: Path) -> None:
    with lock_file(tmp_path / "new" / ".lock"), pytest.raises(BlockingIOError):
        lock_file(tmp_path / "new" / ".lock", wait=False)
    lock_file(tmp_path / "new" / ".lock", wait=False).close()
