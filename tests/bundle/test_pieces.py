"""A bundle's pieces: of a size, whole or refused by name, carried in one go or in several."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refrag_platform.bundle import unbundle
from refrag_platform.bundle.pieces import MIB, TooLarge, write_bundle
from refrag_platform.bundle.unbundle import INDEX, BundleError, unpack
from refrag_platform.errors import RefragError

Members = dict[str, Path | bytes]
FACTS = {"kind": "work", "models": {"tiny": ["cpt"]}}


@pytest.fixture
def members(tmp_path: Path) -> Members:
    """Five files of noise, which no packing makes smaller, and one of text."""
    found: Members = {"refrag_platform/a.py": b"print()\n"}
    for number in range(5):
        path = tmp_path / f"noise-{number}"
        path.write_bytes(np.random.default_rng(number).bytes(MIB // 2 + number))
        found[f"data/tiny/corpus/{number}.bin"] = path
    return found


def write(members: Members, out: Path, **options: Any) -> dict[str, Any]:
    return write_bundle(members, FACTS, out, 1, **options)


def test_what_is_unpacked_is_what_was_packed(members: Members, tmp_path: Path) -> None:
    index = write(members, tmp_path / "out")
    sizes = [(tmp_path / "out" / piece["name"]).stat().st_size for piece in index["pieces"]]
    assert len(sizes) == 3 and sizes[:-1] == [MIB] * 2 and sum(sizes) == index["bytes"]
    assert index["holds"] == {"data/tiny/corpus": 5 * MIB // 2 + 10, "refrag_platform": 8}
    assert unpack([tmp_path / "out"], tmp_path / "there") == index
    assert json.loads((tmp_path / "there" / INDEX).read_text()) == index
    for name, source in members.items():
        packed = source if isinstance(source, bytes) else source.read_bytes()
        assert (tmp_path / "there" / name).read_bytes() == packed


def test_the_same_files_make_the_same_pieces(members: Members, tmp_path: Path) -> None:
    assert write(members, tmp_path / "one") == write(members, tmp_path / "other")


def test_a_file_that_is_there_twice_travels_once(members: Members, tmp_path: Path) -> None:
    before = write(members, tmp_path / "out")["bytes"]
    (tmp_path / "again").write_bytes((tmp_path / "noise-0").read_bytes())
    index = write({**members, "models/tiny/cpt/encoder": tmp_path / "again"}, tmp_path / "with")
    assert index["bytes"] < before + 1000 and index["holds"]["models/tiny/cpt"] == MIB // 2
    unpack([tmp_path / "with"], tmp_path / "there")
    assert (tmp_path / "there" / "models/tiny/cpt/encoder").read_bytes() == (tmp_path / "again").read_bytes()


def test_parts_are_unpacked_together(members: Members, tmp_path: Path) -> None:
    folders = [tmp_path / "1", tmp_path / "2"]
    for part, folder in enumerate(folders, 1):
        write(members, folder, files=3, part=part)
    assert [sorted(path.name for path in folder.iterdir()) for folder in folders] == [
        [INDEX, "piece-0001", "piece-0002"],
        [INDEX, "piece-0003"],
    ]
    with pytest.raises(BundleError, match="missing of 3 pieces: piece-0003; bring them to"):
        unpack(folders[:1], tmp_path / "there")
    unpack(folders, tmp_path / "there")
    with pytest.raises(RefragError, match=r"--part is 3, but the bundle has 2\.5 MiB .* which is 2 part"):
        write(members, tmp_path / "3", files=3, part=3)


def test_more_than_the_files_hold_is_refused_with_the_sizes(members: Members, tmp_path: Path) -> None:
    wanted = r"2\.5 MiB in 3 pieces of 1 MiB, but 2 pieces and bundle.json .* carry it in 2 goes: --part 1 to --part 2"
    with pytest.raises(TooLarge, match=wanted):
        write(members, tmp_path / "out", files=3)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RefragError, match=r"--files is 2, which leaves none .* beside bundle.json, unbundle.py"):
        write(members, tmp_path / "out", files=2, beside={"unbundle.py": b""})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("harm", "name", "message"),
    [
        (flip, "piece-0002", "piece-0002 is damaged"),
        (cut, "piece-0003", "piece-0003 is damaged"),
        (Path.unlink, "piece-0001", "missing of 3 pieces: piece-0001"),
        (Path.unlink, INDEX, f"no {INDEX}"),
        (cut, INDEX, f"{INDEX} is damaged"),
        (lambda path: path.write_text('{"format": 0, "pieces": []}'), INDEX, "has format 0, this program reads 1"),
    ],
)
def test_harm_is_named_and_nothing_is_unpacked(
    members: Members, tmp_path: Path, harm: Callable[[Path], Any], name: str, message: str
) -> None:
    write(members, tmp_path / "out")
    harm(tmp_path / "out" / name)
    with pytest.raises(BundleError, match=message):
        unpack([tmp_path / "out"], tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_parts_of_different_bundles_and_a_folder_in_use_are_refused(members: Members, tmp_path: Path) -> None:
    write(members, tmp_path / "out")
    write({"a": b"b"}, tmp_path / "other")
    with pytest.raises(BundleError, match="different bundles"):
        unpack([tmp_path / "out", tmp_path / "other"], tmp_path / "there")
    with pytest.raises(RefragError, match=r"--out .*out is there already and not empty"):
        write(members, tmp_path / "out")
    with pytest.raises(BundleError, match="is there already"):
        unpack([tmp_path / "out"], tmp_path)


def test_the_script_beside_the_pieces_needs_nothing_but_python(tmp_path: Path) -> None:
    wheel = tmp_path / "pure-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pure.py", "VALUE = 7\n")
    script = Path(unbundle.__file__).read_bytes()
    write({f"wheels/{wheel.name}": wheel, "params.yaml": b""}, tmp_path / "out", beside={"unbundle.py": script})
    command = [sys.executable, "-I", "-S", tmp_path / "out" / "unbundle.py", tmp_path / "there"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "run cpt --model tiny --seconds 540" in said and f"PYTHONPATH={tmp_path / 'there' / 'site-packages'}" in said
    assert (tmp_path / "there" / "site-packages" / "pure.py").read_text() == "VALUE = 7\n"
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "is there already" in again.stderr
