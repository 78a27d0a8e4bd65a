"""Run a long, talkative command with its output in a log: what is seen is one line of progress.

python scripts/quietly.py LOG "Installing torch" pip install torch

On a terminal the line counts the seconds and shows the log's last line; elsewhere it comes at the start and every
minute. Of a command that fails the log's end is shown, and where it lies; its exit status is passed on. Needs nothing
but Python: it runs before anything is installed.
"""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LINES_OF_A_FAILURE = 20
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 60.0


def quietly(log: Path, words: str, command: Sequence[str]) -> int:
    """Run `command`; returns its exit status. The log is appended to; where none can be written all is shown."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.open("ab").close()
    except OSError as error:
        _write(f"{log} can't be written ({error.strerror}); here is all that is said:\n")
        return subprocess.run(command, check=False).returncode
    terminal, begun = sys.stderr.isatty(), time.monotonic()
    said = begun
    if not terminal:
        _write(f"{words} ...\n")
    with log.open("ab") as stream:
        stream.write(f"\n$ {' '.join(command)}\n".encode())
        stream.flush()
        try:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        except OSError as error:
            _write(f"{words}: {command[0]} can't be run ({error.strerror}); after a move of the folder remove .venv\n")
            return 127
        # Whoever stops this stops the command.
        signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
        try:
            while process.poll() is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                now = time.monotonic()
                if terminal:
                    line = f"{words}: {now - begun:.0f} s  {_last_line(log)}"
                    _write(f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}")
                elif now - said > SECONDS_BETWEEN_LINES:
                    said = now
                    _write(f"{words}: {now - begun:.0f} s, {_last_line(log)}\n")
        except KeyboardInterrupt:  # it came to the command as well
            process.wait()
    seconds, status = time.monotonic() - begun, process.returncode
    done = f"{words}: {'done' if status == 0 else f'failed with status {status}'} in {seconds:.0f} s\n"
    _write(f"\r\x1b[2K{done}" if terminal else done)
    if status:
        end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_A_FAILURE:]
        _write("\n".join([*end, f"The whole log: {log}"]) + "\n")
    # Of a signal as a shell has it.
    return status if status >= 0 else 128 - status


def _last_line(log: Path) -> str:
    """The last line of the log that says something, without what would move a cursor."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4000))
        lines = stream.read().decode("utf-8", "replace").splitlines()
    text = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return "".join(sign for sign in text if sign.isprintable())[:100]


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    sys.exit(quietly(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
