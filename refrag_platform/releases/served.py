"""The service runs the released version: changed over when another is released, built again when its Bento is gone.

Run: `refrag serve --model NAME`. After `refrag release rollback NAME` it serves the version before.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from types import FrameType

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.errors import RefragError
from refrag_platform.history.git import Git
from refrag_platform.history.versions import Release, released
from refrag_platform.processes import ends_with_parent
from refrag_platform.project import Project
from refrag_platform.releases.restore import contents
from refrag_platform.serving import bento

PACKAGED = ("finetuned", "chunks", "policy", "evaluation")
SECONDS_BETWEEN_LOOKS = 10.0


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
    """Serve the released version until a signal comes, or the server ends; returns its status.

    Another release takes its place once its Bento is there; one whose Bento can't be had leaves it serving.
    """
    server, serving = _Server(project, port, host), package_to_serve(project, model).bento_tag
    refused: str | None = None
    say(f"serving {serving}")
    server.start(serving)
    while (status := server.wait(SECONDS_BETWEEN_LOOKS)) is None:
        try:
            wanted = package_to_serve(project, model).bento_tag
        except RefragError as error:
            if str(error) != refused:
                say(f"{serving} goes on serving: {error}")
            refused = str(error)
            continue
        if wanted != serving:
            say(f"{wanted} is released now, instead of {serving}")
        elif server.failed():
            say(f"{serving} can't answer any more (its log says why); it is started anew")
        else:
            continue
        server.change(wanted)
        serving = wanted
    return status


class _Server:
    """`bentoml serve` as a child that gets this process's signals."""

    def __init__(self, project: Project, port: int, host: str) -> None:
        self.project, self.port, self.host = project, port, host
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = self._was_ready = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def start(self, tag: str) -> None:
        self._was_ready = False
        self.process = subprocess.Popen(
            bento.serve_command(tag, self.port, self.host),
            env=bento.environment(self.project),
            cwd=self.project.root,
            start_new_session=True,
            preexec_fn=ends_with_parent(signal.SIGTERM),
        )

    def change(self, tag: str) -> None:
        self._end()
        if not self.stopped:
            self.start(tag)

    def wait(self, seconds: float) -> int | None:
        """The status of a server that ended, by itself or by a signal to us; None: it serves on after `seconds`."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if self.stopped:
                self._end()
                return 0
            if self.process is not None and self.process.poll() is not None:
                return self.process.returncode
            time.sleep(0.2)
        return None

    def failed(self) -> bool:
        """Whether a server that was ready has lost its device, say, while its process runs."""
        host = "127.0.0.1" if self.host in {"0.0.0.0", "::"} else self.host
        url = f"http://{host}:{self.port}"
        self._was_ready = self._was_ready or bento.status_of(f"{url}/readyz") == 200
        return self._was_ready and bento.status_of(f"{url}/livez") not in {200, None}

    def _end(self) -> None:
        if self.process is not None:
            bento.end(self.process)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True


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
