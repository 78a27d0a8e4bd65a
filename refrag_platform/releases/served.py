"""The service runs the released version: changed over when another is released, built again when its Bento is gone.

Run: `refrag serve --model NAME`. After `refrag release rollback NAME` it serves the version before.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from types import FrameType

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.errors import RefragError
from refrag_platform.history.git import Git
from refrag_platform.history.versions import Release, released
from refrag_platform.processes import ends_with_parent, listen
from refrag_platform.project import Project
from refrag_platform.releases.restore import contents
from refrag_platform.serving import bento
from refrag_platform.serving.settings import ApiSettings

PACKAGED = ("finetuned", "chunks", "policy", "evaluation")
SECONDS_BETWEEN_LOOKS = 10.0
SECONDS_TO_GET_READY = 900.0


def package_to_serve(project: Project, model: str) -> bento.Package:
    """The released version's package, which is in the store afterwards; unreleased, the one in place.

    Raises:
        ArtifactError: there is neither a release nor a Bento in place.
        RefragError: the released Bento is gone and can't be built again.
    """
    # A copy without Git has no releases.
    release = released(project, model) if Git(project.root).revision("HEAD") else None
    if release is None:
        return bento.Package.of(project, model)
    package = _package(release.manifests["package"])
    stored = {"models": package.model_tag, "bentos": package.bento_tag}
    if not all(bento.store_path(project, kind, tag).is_dir() for kind, tag in stored.items()):
        _build(project, release, package)
    return package


def serve_released(project: Project, model: str, port: int, host: str, say: Callable[[str], None]) -> int:
    """Serve the released version until a signal comes, or the server can't be started; returns its status.

    Another release takes its place once it is ready; one that can't be had, or doesn't get ready, leaves it serving.

    Raises:
        RefragError: the port is taken, or a setting of the environment is wrong.
    """
    server, serving = _Server(project, port, host), package_to_serve(project, model).bento_tag
    refused = unfit = None
    say(f"serving {serving}")
    server.start(serving)
    while (status := server.wait(SECONDS_BETWEEN_LOOKS)) is None:
        try:
            wanted = package_to_serve(project, model).bento_tag
        except RefragError as error:
            if str(error) != refused:
                say(f"{serving} goes on serving: {error}")
            refused, wanted = str(error), serving
        if wanted == serving:
            unfit = None
        if wanted not in (serving, unfit):
            say(f"{wanted} is released now; it takes over from {serving} once it is ready")
            if server.change(wanted, serving):
                say(f"{wanted} has taken over")
                serving = wanted
            elif not server.signals:
                unfit = wanted
                say(
                    f"{serving} goes on serving: {wanted} did not get ready, and its log says why. Mend that and start "
                    f"`refrag serve` anew, or release another version (`refrag release rollback {model}`)"
                )
        elif server.failed():
            say(f"{serving} can't answer any more (its log says why); it is started anew")
            server.restart(serving)
    return status


class _Server:
    """Bentos as children, which accept connections on one socket: it is open as long as this process serves."""

    def __init__(self, project: Project, port: int, host: str) -> None:
        self.project, self.port, self.host = project, port, host
        settings = ApiSettings.from_environment(os.environ)
        # A working copy of the store is for one server at a time.
        self._one_folder, self._patience = settings.store is not None, settings.longest
        self._listener: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._was_ready = False
        # Those that accept no connection any more, and when each is killed: its own end is due before.
        self._leaving: list[tuple[subprocess.Popen[bytes], float]] = []
        self.signals = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def start(self, tag: str) -> None:
        """Serve a Bento; it says itself that it isn't ready yet."""
        self._was_ready = False
        self._process = self._spawn(tag)

    def restart(self, tag: str) -> None:
        """Serve a Bento in place of a server that can't answer."""
        if self._process is not None:
            bento.end(self._process)
        self.start(tag)

    def change(self, tag: str, before: str) -> bool:
        """Have a Bento take over from `before` once it is ready, and the latter end when its answers have.

        False: it didn't get ready, or a signal came; `before` goes on.
        """
        if self._one_folder:
            # Connections wait in the socket's queue meanwhile.
            self._leave()
            self._wait_for_leaving()
        told, tell = socket.socketpair()
        with told:
            with tell:
                new = self._spawn(tag, tell.fileno())
            ready = self._hears(told)
        if not ready:
            bento.end(new, 0)
            if self._one_folder and not self.signals:
                self.start(before)
            return False
        self._leave()
        self._process, self._was_ready = new, True
        return True

    def wait(self, seconds: float) -> int | None:
        """The status of a server that ended before it was ready, or 0 after a signal to us; None: look after it."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            self._end_overdue()
            if self.signals:
                if self._listener is not None:
                    self._listener.close()
                self._leave()
                self._wait_for_leaving()
                return 0
            if self._process is not None and self._process.poll() is not None:
                return None if self._was_ready else self._process.returncode
            time.sleep(0.2)
        return None

    def failed(self) -> bool:
        """Whether a server that was ready has ended, or has lost its device, say, while its process runs."""
        if self._process is not None and self._process.poll() is not None:
            return self._was_ready
        host = "127.0.0.1" if self.host in {"0.0.0.0", "::"} else self.host
        url = f"http://{host}:{self.port}"
        self._was_ready = self._was_ready or bento.status_of(f"{url}/readyz") == 200
        return self._was_ready and bento.status_of(f"{url}/livez") not in {200, None}

    def _spawn(self, tag: str, told: int | None = None) -> subprocess.Popen[bytes]:
        if self._listener is None:
            self._listener = listen(self.host, self.port)
        listener = self._listener.fileno()
        return subprocess.Popen(
            bento.worker_command(tag, self._patience, listener, told),
            env=bento.environment(self.project),
            cwd=self.project.root,
            start_new_session=True,
            pass_fds=(listener,) if told is None else (listener, told),
            preexec_fn=ends_with_parent(signal.SIGTERM),
        )

    def _hears(self, told: socket.socket) -> bool:
        """Whether a server says that it is ready, before it ends, its time is over or a signal comes."""
        ends = time.monotonic() + SECONDS_TO_GET_READY
        told.settimeout(0.2)
        while time.monotonic() < ends and not self.signals:
            with suppress(TimeoutError):
                return told.recv(1) == b"1"
        return False

    def _leave(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._leaving.append((self._process, time.monotonic() + self._patience + bento.SECONDS_TO_STOP))
            self._process = None

    def _wait_for_leaving(self) -> None:
        """Until they have ended; a second signal ends them at once."""
        while self._leaving:
            self._end_overdue()
            time.sleep(0.1)

    def _end_overdue(self) -> None:
        for process, ends in tuple(self._leaving):
            if process.poll() is not None or time.monotonic() > ends or self.signals > 1:
                bento.end(process, 0)
                self._leaving.remove((process, ends))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1


def _package(manifest: Manifest) -> bento.Package:
    return bento.Package(manifest.metrics["model_tag"], manifest.metrics["bento_tag"])


def _build(project: Project, release: Release, package: bento.Package) -> None:
    """Package the release again: its code, its artifacts, and so the same tags, in the project's store.

    Raises:
        RefragError: the artifacts can't be had, or the Bento comes out as another.
    """
    with contents(project, release, PACKAGED) as folders:
        view = Project(folders["chunks"].parents[3])
        archive = Git(project.root).bytes_of("archive", "--format=tar", release.commit)
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            # Not an argument: Python 3.11 knows it from 3.11.4 on.
            files.extraction_filter = getattr(tarfile, "data_filter", None)
            files.extractall(view.root)
        result = subprocess.run(
            [sys.executable, "-m", "refrag_platform", "run", "package", "--model", release.model, "--force"],
            env={**bento.environment(project), "REFRAG_ROOT": str(view.root), "PYTHONPATH": str(view.root)},
            cwd=view.root,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise RefragError(
                f"the Bento {package.bento_tag} of {release.model} {release.version} is gone, and building it again "
                f"failed:\n{result.stderr.strip()[-2000:]}"
            )
        built = _package(Manifest.read(view.stage_dir("package", release.model)))
    if built != package:
        raise RefragError(
            f"the Bento {package.bento_tag} of {release.model} {release.version} is gone, and building it again made "
            f"{built.bento_tag}: its commit {release.commit[:12]} does not hold the code that it was made from"
        )
