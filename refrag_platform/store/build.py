"""The chunks stage, passages and chunk vectors of a corpus: `refrag run chunks --model NAME`.

The work goes in parts of a few hundred passages. A finished part is renamed into the stage's scratch folder,
so a killed run continues with the first part that is not there. Any number of processes may make parts
(store/cluster.py); one puts them together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from refrag_platform.artifacts.digest import file_digest
from refrag_platform.artifacts.manifest import published
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.files import whole_by_many
from refrag_platform.model.loading import default_device
from refrag_platform.model.precision import cpu_autocast
from refrag_platform.model.prompts import content_ids, passage_text
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import chunk_tokens
from refrag_platform.progress import Progress, say
from refrag_platform.stages import StageContext
from refrag_platform.store.content import PASSAGES_FILE, StoreDescription, chunk_file, passage_schema
from refrag_platform.store.retriever import Retriever, load_retriever
from refrag_platform.store.reuse import WHO, Arrays, KnownPassages, difference
from refrag_platform.weights import tokenizer_digest

if TYPE_CHECKING:
    import pyarrow as pa

    from refrag_platform.corpus.question import Passage

PASSAGES_PER_PART = 256
CHUNKS_PER_FILE = 262_144
# What a part says of itself: a worker that was given up for dead may still bring one of an earlier run.
MADE_FROM = "made_from"
COLUMNS = ["id", "document_id", "title", "text"]


def build_chunks(context: StageContext) -> dict[str, Any]:
    """Chunk, encode and write every passage (REFRAG, section 2: chunk vectors can be made ahead).

    Memory is bounded by one chunk file, whatever the corpus' size.

    Raises:
        ArtifactError: the corpus has no passages.
        RefragError: vectors don't fit float16.
    """
    return write_store(PartWriter.of(context), context.inputs["corpus"] / PASSAGES_FILE, context.out)


@dataclass(frozen=True)
class PartWriter:
    """Makes the parts of a store in the folder `work`, from which a killed run goes on; several writers may share it.

    wanted: `describe`'s. batch_size: most chunks encoded at once. known: a store whose passages are taken over where
    they did not change.
    """

    model: RefragModel
    retriever: Retriever
    wanted: StoreDescription
    work: Path
    batch_size: int
    known: KnownPassages | None = None

    @classmethod
    def of(cls, context: StageContext, reuse: bool = True) -> PartWriter:
        """That of the chunks stage. reuse: whether passages of the store in place may keep their vectors.

        Raises:
            ArtifactError: the corpus has no passages.
        """
        model, device = RefragModel.load(context.inputs["finetuned"]), default_device()
        # Float32 weights on any device: vectors are made once and read for ever. The decoder stays where it is.
        model.encoder.to(device)
        base = context.project.recipe_path(context.recipe.name).parent
        retriever = load_retriever(context.recipe.chunks.retriever, base, device)
        passages = _passages(context.inputs["corpus"] / PASSAGES_FILE)
        wanted = describe(context.recipe.name, model, retriever, passages)
        wanted = replace(wanted, index_from=context.recipe.chunks.index_from)
        known = _known_passages(context, wanted) if reuse else None
        return cls(model, retriever, wanted, context.work, context.recipe.chunks.batch_size, known)

    def write(self, number: int, batch: pa.RecordBatch) -> int:
        """Make a part, unless it is there; returns how many of its passages were encoded.

        Raises:
            RefragError: vectors don't fit float16.
        """
        if self.has(number, batch):
            return 0
        rows, encoded = _rows(self.model, self.retriever, batch, self.batch_size, self.known)
        _save(rows, _part(self.work, number), self._made_from(batch))
        return encoded

    def has(self, number: int, batch: pa.RecordBatch) -> bool:
        """Whether the part is whole, and of these passages."""
        try:
            with safe_open(_part(self.work, number), framework="np") as part:
                return bool((part.metadata() or {}).get(MADE_FROM) == self._made_from(batch))
        except FileNotFoundError:
            return False

    def read(self, number: int, batch: pa.RecordBatch) -> Arrays:
        """The arrays of a part.

        Raises:
            ArtifactError: it is not there, or was made of other passages or by another encoder.
        """
        if not self.has(number, batch):
            raise ArtifactError(f"{_part(self.work, number)} was replaced or removed; run the stage again")
        with safe_open(_part(self.work, number), framework="np") as part:
            return {name: part.get_tensor(name) for name in part.keys()}  # noqa: SIM118

    def _made_from(self, batch: pa.RecordBatch) -> str:
        """Hash of the passages and of who encodes them."""
        facts = [getattr(self.wanted, name) for name in WHO] + [batch[name].to_pylist() for name in COLUMNS]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def describe(name: str, model: RefragModel, retriever: Retriever, passages: int) -> StoreDescription:
    """What store.json says of a store that is to be made, without its chunk files."""
    return StoreDescription(
        model=name,
        encoder_digest=model.encoder_digest(),
        tokenizer_digest=tokenizer_digest(model.tokenizer),
        chunk_size=model.chunk_size,
        vector_dim=model.vector_dim,
        retriever=retriever.name,
        retriever_digest=retriever.digest,
        retriever_dim=retriever.dim,
        passages=passages,
        chunks=0,
        files={},
    )


def write_store(writer: PartWriter, passages: Path, out: Path) -> dict[str, Any]:
    """Make a store of a parquet file (id, document_id, title, text) in the folder `out`; returns its figures.

    Raises:
        RefragError: vectors don't fit float16.
    """
    encode_parts(writer, passages)
    files, metrics = _assemble(writer, passages, out)
    digests = {name: file_digest(out / name) for name in (PASSAGES_FILE, *files)}
    replace(writer.wanted, chunks=sum(files.values()), files=files, digests=digests).write(out)
    return {"passages": writer.wanted.passages, "chunks": sum(files.values()), **metrics}


def encode_parts(writer: PartWriter, passages: Path) -> None:
    """Make all parts that are not there, in this process."""
    encoded = 0
    with Progress("encode passages", writer.wanted.passages, "passages") as progress:
        for number, batch in enumerate(passage_batches(passages)):
            encoded += writer.write(number, batch)
            progress.update(batch.num_rows, f"{encoded:,} encoded")


def _passages(path: Path) -> int:
    import pyarrow.parquet as pq

    total = int(pq.ParquetFile(path).metadata.num_rows)
    if not total:
        raise ArtifactError(f"{path} has no passages; make the corpus again with `refrag run corpus --force`")
    return total


def passage_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The corpus' passages, a part at a time and always cut alike."""
    import pyarrow.parquet as pq

    yield from pq.ParquetFile(path).iter_batches(batch_size=PASSAGES_PER_PART, columns=COLUMNS)


def _known_passages(context: StageContext, wanted: StoreDescription) -> KnownPassages | None:
    """The store in place, whose passages are taken over where they did not change; says so, or why not."""
    name = context.recipe.name
    manifest = published(context.project, "chunks", name)
    if manifest is None:
        return None
    content = context.project.content("chunks", name)
    try:
        known = StoreDescription.read(content)
        reason = difference(known, wanted)
    except ArtifactError as error:
        reason = str(error)
    if reason is not None:
        say(f"the whole chunk store of {name} is encoded again: {reason}")
        return None
    say(f"passages of {name} that did not change keep their vectors: they are of the same encoder")
    return KnownPassages(content, known)


def _rows(
    model: RefragModel, retriever: Retriever, batch: pa.RecordBatch, batch_size: int, known: KnownPassages | None
) -> tuple[Arrays, int]:
    """A part, and how many of its passages were encoded; the others are taken over."""
    if known is None:
        return _encode(model, retriever, batch, batch_size), batch.num_rows
    titles, texts = batch["title"].to_pylist(), batch["text"].to_pylist()
    stored = [known.find(title, text) for title, text in zip(titles, texts, strict=True)]
    new = [number for number, rows in enumerate(stored) if rows is None]
    encoded: Iterator[Arrays] = iter(())
    if new:
        import pyarrow as pa

        encoded = _split(_encode(model, retriever, batch.take(pa.array(new)), batch_size))
    rows = [next(encoded) if kept is None else kept for kept in stored]
    return {
        "token_ids": np.concatenate([row["token_ids"] for row in rows]),
        "vectors": np.concatenate([row["vectors"] for row in rows]),
        "chunk_counts": np.array([len(row["token_ids"]) for row in rows], np.int32),
        "retrieval_vectors": np.stack([row["retrieval_vector"] for row in rows]),
    }, len(new)


def _split(part: Arrays) -> Iterator[Arrays]:
    """The passages of a part, one by one."""
    end = 0
    for number, count in enumerate(part["chunk_counts"]):
        start, end = end, end + int(count)
        chunks = {name: part[name][start:end] for name in ("token_ids", "vectors")}
        yield {**chunks, "retrieval_vector": part["retrieval_vectors"][number]}


def _part(work: Path, number: int) -> Path:
    return work / f"part-{number:06}.safetensors"


def _encode(model: RefragModel, retriever: Retriever, batch: pa.RecordBatch, batch_size: int) -> Arrays:
    passages = list(zip(batch["title"].to_pylist(), batch["text"].to_pylist(), strict=True))
    return encode_passages(model, retriever, passages, batch_size, f"{batch['id'][0]} to {batch['id'][-1]}")


def encode_passages(
    model: RefragModel, retriever: Retriever, passages: Sequence[Passage], batch_size: int, named: str
) -> Arrays:
    """A store's arrays: token_ids [n, k], vectors [n, dim], and per passage chunk_counts and retrieval_vectors.

    Raises:
        RefragError: vectors don't fit float16; it says `named` for the passages.
    """
    texts = [passage_text(*passage) for passage in passages]
    ids = [content_ids(model.tokenizer, text) for text in texts]
    chunks = [chunk_tokens(tokens, model.chunk_size) for tokens in ids]
    token_ids = torch.cat(chunks)
    with torch.inference_mode(), cpu_autocast():
        encoded = model.encoder.encode_passages(chunks, batch_size)
    vectors = torch.cat([part.half().cpu() for part in encoded])
    if not bool(vectors.isfinite().all()):
        raise RefragError(
            f"the encoder's vectors of passages {named} don't fit float16; "
            "train the checkpoint again with a lower encoder_learning_rate"
        )
    return {
        "token_ids": token_ids.numpy().astype(np.int32),
        "vectors": vectors.numpy(),
        "chunk_counts": np.array([len(rows) for rows in chunks], np.int32),
        "retrieval_vectors": retriever.encode(texts).astype(np.float32),
    }


def _save(arrays: Arrays, path: Path, made_from: str) -> None:
    """Write a part whose name appears only when all its bytes are on the disk, whoever else is writing it."""
    with whole_by_many(path) as partial:
        save_file(arrays, partial, {MADE_FROM: made_from})


def _assemble(writer: PartWriter, passages: Path, out: Path) -> tuple[dict[str, int], dict[str, float]]:
    """Join the parts into chunk files and passages.parquet; returns chunks per file, and metrics."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    retriever_dim = writer.retriever.dim
    schema = passage_schema(retriever_dim)
    files: dict[str, int] = {}
    waiting: list[Arrays] = []
    chunks, norms, mean, squares = 0, 0.0, 0.0, 0.0

    def flush() -> None:
        joined = {name: np.concatenate([part[name] for part in waiting]) for name in ("token_ids", "vectors")}
        name = chunk_file(len(files))
        save_file(joined, out / name)
        files[name] = len(joined["vectors"])
        waiting.clear()

    with pq.ParquetWriter(out / PASSAGES_FILE, schema) as rows:
        for number, batch in enumerate(passage_batches(passages)):
            part = writer.read(number, batch)
            size = len(part["vectors"])
            if waiting and sum(len(held["vectors"]) for held in waiting) + size > CHUNKS_PER_FILE:
                flush()
            waiting.append(part)
            counts = part["chunk_counts"]
            starts = chunks + np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
            retrieval = pa.FixedSizeListArray.from_arrays(pa.array(part["retrieval_vectors"].ravel()), retriever_dim)
            columns = [batch[name] for name in COLUMNS]
            columns += [pa.array(starts), pa.array(counts), retrieval]
            rows.write_batch(
                pa.RecordBatch.from_arrays(
                    [c.cast(f.type) for c, f in zip(columns, schema, strict=True)], schema=schema
                )
            )
            vectors = part["vectors"].astype(np.float64)
            chunks += size
            norms += float(np.linalg.norm(vectors, axis=1).sum())
            mean, squares = mean + vectors.sum(0), squares + (vectors**2).sum(0)
    flush()
    # Near zero means that the encoder has collapsed to a constant.
    spread = float(np.sqrt(np.maximum(squares / chunks - (mean / chunks) ** 2, 0)).mean())
    return files, {"vector_norm": round(norms / chunks, 4), "vector_std": round(spread, 6)}
