"""Check and unpack a bundle with nothing but Python; `refrag bundle export` writes this file beside the pieces.

    python unbundle.py FOLDER                  the pieces lie beside this file
    python unbundle.py FOLDER DIR...           or in further folders, too
    python unbundle.py FOLDER --run SECONDS    also run the stages, and write what they made to FOLDER.results

A bundle is a gzipped tar archive, cut into pieces, and bundle.json, which says what it holds and how each piece hashes.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FORMAT = 1
INDEX = "bundle.json"
WHEELS, SITE_PACKAGES = "wheels", "site-packages"
BLOCK = 1 << 20
PAUSED = 3  # status of `refrag run`: stopped, and saved


class BundleError(Exception):
    """A bundle is incomplete or damaged, or there is a folder where it would be unpacked."""


def read_index(folders: Sequence[Path]) -> dict[str, Any]:
    """bundle.json of the bundle whose pieces lie in `folders`; it may lie in several of them, being the same.

    Raises:
        BundleError: there is none, it can't be read, or the folders hold parts of different bundles.
    """
    files = [folder / INDEX for folder in folders if (folder / INDEX).is_file()]
    if not files:
        raise BundleError(f"no {INDEX} in {', '.join(map(str, folders))}: that is no bundle, or not all of it is there")
    try:
        indexes = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        formats = {index["format"] for index in indexes}
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"{files[0]} is damaged; fetch it again") from None
    if any(index != indexes[0] for index in indexes):
        raise BundleError(f"{' and '.join(map(str, files))} are of different bundles; give the folders of one")
    if formats != {FORMAT}:
        raise BundleError(f"{files[0]} has format {formats.pop()}, this program reads {FORMAT}: use that of the export")
    return dict(indexes[0])


def check_pieces(folders: Sequence[Path], index: dict[str, Any], on_piece: Callable[[str], None]) -> list[Path]:
    """The pieces in their order, every byte of them checked.

    Raises:
        BundleError: pieces are missing or damaged; it names them.
    """
    places = {piece["name"]: [folder / piece["name"] for folder in folders] for piece in index["pieces"]}
    found = {name: next((file for file in files if file.is_file()), None) for name, files in places.items()}
    if missing := [name for name, file in found.items() if file is None]:
        raise BundleError(
            f"missing of {len(found)} pieces: {', '.join(missing)}; bring them to {' or '.join(map(str, folders))}"
        )
    paths = []
    for piece in index["pieces"]:
        path = found[piece["name"]]
        assert path is not None
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != piece["sha256"]:
                raise BundleError(
                    f"{path} is damaged: its {path.stat().st_size:,} bytes are not the {piece['bytes']:,} of "
                    f"{INDEX}; fetch it again"
                )
        paths.append(path)
        on_piece(f"{piece['name']} of {len(found)} is whole")
    return paths


def unpack(
    folders: Sequence[Path], target: Path, on_piece: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Make the folder `target` of a bundle, whole or not at all; returns its bundle.json, which is put into it, too.

    Raises:
        BundleError: as above, or `target` is there already.
    """
    index = read_index(folders)
    if target.exists():
        raise BundleError(f"{target} is there already; give a folder that is not, or remove it")
    pieces = check_pieces(folders, index, on_piece)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with (
        io.BufferedReader(_Joined(pieces), BLOCK) as joined,
        gzip.GzipFile(fileobj=joined) as stream,
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
        archive.extractall(partial, filter=_member)
    for wheel in sorted((partial / WHEELS).glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive_of_wheel:
            archive_of_wheel.extractall(partial / SITE_PACKAGES)
    shutil.rmtree(partial / WHEELS, ignore_errors=True)
    (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    partial.rename(target)
    return index


def _member(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """A member that is safe to unpack, its time that of now: DVC takes files of one time and size for the same."""
    return tarfile.data_filter(member, folder).replace(mtime=None, deep=False)  # type: ignore[arg-type]


class _Joined(io.RawIOBase):
    """Files read one after the other as one stream."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._waiting = list(paths)
        self._stream: io.BufferedReader | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._stream is None:
                if not self._waiting:
                    return 0
                self._stream = self._waiting.pop(0).open("rb")
            if count := self._stream.readinto(buffer):
                return count
            self._stream.close()
            self._stream = None


def in_words(models: dict[str, list[str]]) -> str:
    """The stages of each model; empty where there are none."""
    return "; ".join(f"{', '.join(stages)} of {model}" for model, stages in models.items() if stages)


def run(target: Path, index: dict[str, Any], seconds: float) -> int:
    """Run the stages for some time, and write what came of it to `target`.results; the status is that of the run."""
    paths = [str(target / SITE_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    refrag = [sys.executable, "-m", "refrag_platform"]
    options: dict[str, Any] = {
        "cwd": target,
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "REFRAG_ROOT": str(target)},
    }
    end, status = time.monotonic() + seconds, 0
    running: list[subprocess.Popen[bytes]] = []
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        for process in running:
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    for model, stages in index["models"].items():
        left = end - time.monotonic()
        if stopped or left < 1:
            status = PAUSED
        if status:
            break
        # A session of its own, so that a signal comes once, from here; Linux ends it with this process.
        process = subprocess.Popen(
            [*refrag, "run", *stages, "--model", model, "--seconds", str(left)],
            start_new_session=True,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL),
            **options,
        )
        running[:] = [process]
        if stopped:
            process.send_signal(signal.SIGTERM)
        status = process.wait()
    if status in (0, PAUSED):
        results = target.with_name(f"{target.name}.results")
        shutil.rmtree(results, ignore_errors=True)
        subprocess.run([*refrag, "bundle", "export", "--results", "--out", str(results)], check=False, **options)
    return status


def main(target: Path, further: Sequence[Path], seconds: float | None) -> int:
    index = unpack([Path(__file__).resolve().parent, *further], target, print)
    if seconds is not None:
        return run(target, index, seconds)
    print(f"\n{target} is ready. Run this there, again and again while it ends with status 3 (stopped, and saved):\n")
    print(f"  cd {target}")
    if (target / SITE_PACKAGES).is_dir():
        print(f"  export PYTHONPATH={target / SITE_PACKAGES}")
    for model, stages in index["models"].items():
        print(f"  python -m refrag_platform run {' '.join(stages)} --model {model} --seconds 540")
    print("  python -m refrag_platform bundle export --results --out ../results")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("further", type=Path, nargs="*")
    parser.add_argument("--run", metavar="SECONDS", type=float)
    given = parser.parse_args()
    try:
        sys.exit(main(given.folder, given.further, given.run))
    except BundleError as error:
        sys.exit(f"unbundle: {error}")
