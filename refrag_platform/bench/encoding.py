"""Chunk stores encoded by one process and on a Ray cluster, side by side: `refrag bench encode --help`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import hardware
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.project import Project
from refrag_platform.stages import StageContext
from refrag_platform.store.build import PASSAGES_PER_PART, PartWriter, encode_parts, passage_batches, write_store
from refrag_platform.store.cluster import cluster, worker_count, write_parts
from refrag_platform.store.content import PASSAGES_FILE


def bench_encoding(project: Project, model: str, passages: int, address: str | None = None) -> dict[str, Any]:
    """A row for this process and one for the cluster, each of a whole store of the corpus' first passages.

    Args: address: as of `cluster`; of other machines, the scratch folder must be one that they share.

    Raises:
        ArtifactError: corpus or fine-tuned model are not made.
        RefragError: fewer passages than two parts a worker, or as of `build_chunks_on_ray`.
    """
    work = project.work_dir("chunks", model)
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix="bench-") as scratch:
        folder = Path(scratch)
        inputs = {"corpus": folder, "finetuned": project.content("finetuned", model)}
        total = _first_passages(project.content("corpus", model) / PASSAGES_FILE, passages, folder / PASSAGES_FILE)

        def context(engine: str) -> StageContext:
            out, state = folder / engine / "content", folder / engine / "state"
            out.mkdir(parents=True)
            state.mkdir()
            return StageContext(project, project.recipe(model), "chunks", inputs, out, state, folder / engine)

        with cluster(address):
            workers = worker_count()
            if total < 2 * workers * PASSAGES_PER_PART:
                raise RefragError(
                    f"{total:,} passages are too few for {workers} workers; "
                    f"take {2 * workers * PASSAGES_PER_PART:,} or many more, by --passages"
                )
            on_ray = _row(context("ray"), workers, lambda context: write_parts(context, reuse=False))
        # Without the cluster's own processes beside it.
        rows = [
            {"engine": "process", "processes": 1, **_row(context("process"), 1, _alone)},
            {"engine": "ray", "processes": workers, **on_ray},
        ]
        stores = {folder_digest(folder / row["engine"] / "content") for row in rows}
    return {
        "benchmark": "encode",
        "model": model,
        "passages": total,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "hardware": hardware(),
        "same_bytes": len(stores) == 1,
        "rows": rows,
    }


def _first_passages(corpus: Path, passages: int, path: Path) -> int:
    """Write the first passages of a corpus; returns how many there are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not corpus.is_file():
        raise ArtifactError(f"no passages at {corpus}; make them with `refrag run corpus --model NAME`")
    batches = islice(passage_batches(corpus), -(-passages // PASSAGES_PER_PART))
    table = pa.Table.from_batches(batches).slice(0, passages)
    pq.write_table(table, path)
    return int(table.num_rows)


def _alone(context: StageContext) -> PartWriter:
    writer = PartWriter.of(context, reuse=False)
    encode_parts(writer, context.inputs["corpus"] / PASSAGES_FILE)
    return writer


def _row(context: StageContext, processes: int, write: Callable[[StageContext], PartWriter]) -> dict[str, Any]:
    begun = time.time()
    writer = write(context)
    # As many parts as there are processes end the start, so that loading hardly counts as encoding.
    ended = sorted(path.stat().st_mtime for path in context.work.glob("part-*"))
    started, last = ended[processes - 1], ended[-1]
    written = time.time()
    write_store(writer, context.inputs["corpus"] / PASSAGES_FILE, context.out)
    return {
        "start_seconds": round(started - begun, 3),
        "passages_per_second": round((writer.wanted.passages - processes * PASSAGES_PER_PART) / (last - started), 2),
        "join_seconds": round(time.time() - written, 3),
    }
