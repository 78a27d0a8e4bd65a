"""The chunks stage on a Ray cluster, the same artifact from many processes: `refrag run chunks --engine ray`.

The driver streams the passages to workers, a GPU each where there are any; a worker writes its parts into the stage's
scratch folder, which all machines share. A worker that dies is started again, and so is its part. Once all parts are
there, the driver puts them together as it would those of its own.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from refrag_platform.errors import RefragError
from refrag_platform.progress import Progress, say
from refrag_platform.stages import StageContext
from refrag_platform.store.build import PartWriter, passage_batches, write_store
from refrag_platform.store.content import PASSAGES_FILE

if TYPE_CHECKING:
    import pyarrow as pa

# What a worker has waiting beside the part at work, so that it needn't wait for the driver.
PARTS_AHEAD = 1
# A part that kills this many workers more is what kills them.
RETRIES = 3
SECONDS_TO_CONNECT = 10
# After so long without a part it is looked whether all workers are there.
SECONDS_BETWEEN_LOOKS = 10


def build_chunks_on_ray(context: StageContext, address: str | None = None) -> dict[str, Any]:
    """`build_chunks` by the workers of a cluster; memory of the driver is bounded by one chunk file and their parts.

    Args: address: as of `cluster`.

    Raises:
        ArtifactError: the corpus has no passages.
        RefragError: no cluster, vectors that don't fit float16, a part on which worker after worker died, or a machine
            that is gone.
    """
    with cluster(address):
        writer = write_parts(context)
    return write_store(writer, context.inputs["corpus"] / PASSAGES_FILE, context.out)


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Be a driver of the cluster at HOST:PORT, of the one that runs here (`auto`), or of one made for the block (None).

    Raises:
        RefragError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise RefragError("Ray is not installed here; `pip install 'refrag-platform[ray]'`") from None
    before, where = signal.getsignal(signal.SIGTERM), f"at {address}" if address else "on this machine"
    try:
        if address not in (None, "auto"):
            # Ray itself tries for minutes.
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=SECONDS_TO_CONNECT).close()
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise RefragError(f"no Ray cluster {where}: {error}; `ray start --head` starts one") from None
    try:
        # Ray has put its own in place, which ends the process.
        signal.signal(signal.SIGTERM, before)
        yield
    finally:
        ray.shutdown()


def write_parts(context: StageContext, reuse: bool = True) -> PartWriter:
    """Let the workers of this process' cluster make all parts that are not there; returns who can put them together.

    Args: reuse: as of `PartWriter.of`.

    Raises:
        RefragError: as of `build_chunks_on_ray`.
    """
    import ray
    from ray.util import ActorPool

    gpus, count = _gpus(), worker_count()
    worker = ray.remote(num_cpus=1, num_gpus=min(gpus, 1), max_restarts=-1, max_task_retries=RETRIES)(_Worker)
    writer = PartWriter.of(context, reuse)
    passages = writer.wanted.passages
    say(f"{count} Ray workers encode, " + ("a GPU each" if gpus else "a CPU each"))
    pool = ActorPool([worker.remote(context, reuse) for _ in range(count)] * (1 + PARTS_AHEAD))
    encoded = 0
    with Progress("encode on Ray", passages, "passages") as progress:

        def take() -> None:
            nonlocal encoded
            rows, new = _result(pool, count)
            encoded += new
            progress.update(rows, f"{encoded:,} encoded")

        for number, batch in enumerate(passage_batches(context.inputs["corpus"] / PASSAGES_FILE)):
            if writer.has(number, batch):
                progress.update(batch.num_rows)
                continue
            if not pool.has_free():
                take()
            pool.submit(lambda actor, part: actor.write.remote(*part), (number, batch))
        while pool.has_next():
            take()
    return writer


def worker_count() -> int:
    """Workers on this process' cluster: one for each GPU, or where there are none for each CPU.

    Raises:
        RefragError: it has neither.
    """
    import ray

    count = _gpus() or int(ray.cluster_resources().get("CPU", 0))
    if not count:
        raise RefragError("the Ray cluster has neither a GPU nor a CPU; `ray status` says which machines joined it")
    return count


def _gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


class _Worker:
    """A process of the cluster that has the encoder."""

    def __init__(self, context: StageContext, reuse: bool) -> None:
        self._context, self._reuse = context, reuse

    @cached_property
    def _writer(self) -> PartWriter:
        # With the first part: what is raised while an actor is made reaches nobody as it is.
        if not self._context.work.is_dir():
            raise RefragError(f"a Ray worker finds no {self._context.work}; all machines must share the checkout")
        return PartWriter.of(self._context, self._reuse)

    def write(self, number: int, batch: pa.RecordBatch) -> tuple[int, int]:
        """Passages of the part, and how many of them were encoded."""
        return batch.num_rows, self._writer.write(number, batch)


def _result(pool: Any, workers: int) -> tuple[int, int]:
    """What the next of these workers to finish returns.

    Raises:
        RefragError: that of the worker, its machine is gone, or a part killed worker after worker.
    """
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

    while True:
        try:
            return pool.get_next_unordered(timeout=SECONDS_BETWEEN_LOOKS)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, RefragError) else error) from None
        except TimeoutError:
            # A worker without a place waits for one without end, and its parts with it.
            if (left := worker_count()) < workers:
                raise RefragError(
                    f"a machine is gone, there is room for {left} of {workers} workers; the same command goes on there"
                ) from None
        except (RayActorError, OutOfMemoryError) as error:
            raise RefragError(
                f"a part's worker died {1 + RETRIES} times, out of memory say (its log is under /tmp/ray), or its "
                f"machine is gone; the same command goes on with the parts that are whole: {error}"
            ) from None
