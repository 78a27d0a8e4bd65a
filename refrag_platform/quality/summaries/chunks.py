"""Summary rows of a chunk-embedding store: one per vector file and one for the whole store."""

from __future__ import annotations

from collections import Counter

from refrag_platform.quality.summaries.artifact import Artifact, SummaryRow, read_json, wanted

VECTORS_AT_ONCE = 1 << 16


def files(artifact: Artifact) -> list[SummaryRow]:
    """Passages, chunk vectors and facts."""
    return artifact.files(["passages.parquet", "chunks-*.safetensors", "store.json"])


def shards(artifact: Artifact) -> list[SummaryRow]:
    """One row per vector file: chunks, vectors, least norm, spread, token ids out of range.

    spread: standard deviation over chunks relative to the vectors' root mean square; 0 = all vectors equal.
    """
    import torch
    from safetensors import safe_open

    vocabulary = wanted(read_json(artifact.inputs["corpus"] / "corpus.json"), "vocabulary", "corpus.json")
    rows = []
    for path in sorted(artifact.content.glob("chunks-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            token_ids = file.get_tensor("token_ids")
            vectors = file.get_slice("vectors")
            count, dim = vectors.get_shape()
            nonfinite, norms = 0, []
            total, squares = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
            for start in range(0, count, VECTORS_AT_ONCE):
                block = vectors[start : start + VECTORS_AT_ONCE].double()
                finite = block.isfinite().all(1)
                nonfinite += int((~finite).sum())
                norms.append(block[finite].norm(dim=1))
                total += block[finite].sum(0)
                squares += block[finite].square().sum(0)
        norm = torch.cat(norms) if norms else torch.zeros(0)
        usable = max(len(norm), 1)
        power = squares.sum() / usable
        spread = ((power - (total / usable).square().sum()).clamp(min=0) / power.clamp(min=1e-12)).sqrt()
        padded = token_ids < 0
        holes = (padded[:, :-1] & ~padded[:, 1:]).any(1) | padded.all(1)
        rows.append(
            {
                "row": path.name,
                "chunks": len(token_ids),
                "vectors": count,
                "nonfinite": nonfinite,
                "norm_min": float(norm.min()) if len(norm) else 0.0,
                "spread": float(spread),
                "outside_vocabulary": int(((token_ids < -1) | (token_ids >= vocabulary)).sum()),
                "padding_wrong": int(holes.sum()),
            }
        )
    return rows


def store(artifact: Artifact) -> list[SummaryRow]:
    """The one row of the whole store: counts, spans, duplicates, digest of the encoder, retrieval vectors."""
    import numpy as np
    import pyarrow.parquet as pq
    from safetensors import safe_open

    facts = artifact.read_json("store.json")
    chunks = width = 0
    for path in sorted(artifact.content.glob("chunks-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            count, width = file.get_slice("token_ids").get_shape()
            chunks += count
    identities: Counter[str] = Counter()
    passages = spans_wrong = retrieval_faults = end = 0
    parquet = pq.ParquetFile(artifact.content / "passages.parquet")
    for batch in parquet.iter_batches(columns=["id", "chunk_start", "chunk_count", "retrieval_vector"]):
        identities.update(batch.column("id").to_pylist())
        passages += len(batch)
        for start, count in zip(
            batch.column("chunk_start").to_pylist(), batch.column("chunk_count").to_pylist(), strict=True
        ):
            spans_wrong += int(start != end or count < 1)
            end = start + count
        vectors = np.stack(batch.column("retrieval_vector").to_numpy(zero_copy_only=False)).astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1)
        retrieval_faults += int((~np.isfinite(norms) | (norms < 1e-6)).sum())
    served = read_json(artifact.inputs["finetuned"] / "model.json")
    return [
        {
            "row": "store",
            "passages": passages,
            "passages_stated": wanted(facts, "passages", "store.json"),
            "chunks": chunks,
            "chunks_of_passages": end,
            "spans_wrong": spans_wrong,
            "duplicates": sum(times - 1 for times in identities.values()),
            "encoder_digest": wanted(facts, "encoder_digest", "store.json"),
            "encoder_digest_of_model": wanted(served, "encoder_digest", "model.json of finetuned"),
            "chunk_size": width,
            "chunk_size_of_recipe": artifact.recipe.encoder.chunk_size,
            "retrieval_faults": retrieval_faults,
        }
    ]
