"""Summary rows of a corpus: one per shard and one per split, counted from the files themselves."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from refrag_platform.quality.summaries.artifact import Artifact, Row, Table, read_lines, wanted

SPLITS = ("train", "validation", "test")
TOKENS_AT_ONCE = 1 << 22


def files(artifact: Artifact) -> list[Row]:
    """Shards of each split, documents, passages, questions, facts and the tokenizer."""
    names = [f"{split}/tokens-*.bin" for split in SPLITS]
    names += ["documents.parquet", "passages.parquet", "corpus.json", "tokenizer.json"]
    if artifact.recipe.corpus.questions_per_document and any(
        source.kind == "factbook" for source in artifact.recipe.corpus.sources
    ):
        names += [f"questions/{split}.jsonl" for split in SPLITS]
    return artifact.files(names)


def shards(artifact: Artifact) -> list[Row]:
    """One row per shard: tokens in the file and in its documents' records, ids outside the vocabulary."""
    import numpy as np

    facts = artifact.read_json("corpus.json")
    vocabulary = wanted(facts, "vocabulary", "corpus.json")
    dtype = np.dtype(wanted(facts, "dtype", "corpus.json")).newbyteorder("<")
    documents: dict[str, list[tuple[int, int]]] = defaultdict(list)
    columns = _columns(artifact.content / "documents.parquet", "split", "shard", "start", "tokens")
    for split, shard, start, tokens in zip(*columns, strict=True):
        documents[f"{split}/{shard_name(shard)}"].append((start, tokens))
    rows = []
    for path in sorted(artifact.content.glob("*/tokens-*.bin")):
        name = path.relative_to(artifact.content).as_posix()
        ids = np.memmap(path, dtype, "r") if path.stat().st_size >= dtype.itemsize else np.empty(0, dtype)
        blocks = [ids[start : start + TOKENS_AT_ONCE] for start in range(0, len(ids), TOKENS_AT_ONCE)]
        places = sorted(documents.get(name, []))
        ends = [0, *(start + tokens for start, tokens in places)]
        rows.append(
            {
                "row": name,
                "tokens": len(ids),
                "tokens_of_documents": sum(tokens for _, tokens in places),
                "misplaced": sum(start != end for (start, _), end in zip(places, ends, strict=False)),
                "min_id": min((int(block.min()) for block in blocks), default=0),
                "max_id": max((int(block.max()) for block in blocks), default=0),
                "outside_vocabulary": sum(int((block >= vocabulary).sum()) for block in blocks),
            }
        )
    return rows


def splits(artifact: Artifact) -> list[Row]:
    """One row per split: documents, tokens, lengths, duplicates, leakage, passages and questions astray."""
    columns = _columns(artifact.content / "documents.parquet", "id", "sha256", "split", "tokens", "characters")
    marks: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    count: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    split_of: dict[str, str] = {}
    for identity, sha256, split, tokens, characters in zip(*columns, strict=True):
        marks[split].update((f"id {identity}", f"text {sha256}"))
        count[split].update(documents=1, tokens=tokens, empty=int(not tokens or not characters))
        split_of[identity] = split
    astray = Counter(
        split
        for document, split in zip(
            *_columns(artifact.content / "passages.parquet", "document_id", "split"), strict=True
        )
        if split_of.get(document) != split
    )
    stated = wanted(artifact.read_json("corpus.json"), "tokens", "corpus.json")
    rows = []
    for split in SPLITS:
        elsewhere = set().union(*(marks[other] for other in SPLITS if other != split))
        rows.append(
            {
                "row": split,
                "documents": count[split]["documents"],
                "tokens": count[split]["tokens"],
                "tokens_stated": stated.get(split, 0),
                "empty": count[split]["empty"],
                "duplicates": sum(times - 1 for times in marks[split].values()),
                "leaked": sum(mark in elsewhere for mark in marks[split]),
                "passages_astray": astray[split],
                **_questions(artifact.content / "questions" / f"{split}.jsonl", split, split_of),
            }
        )
    return rows


def _questions(path: Path, split: str, split_of: dict[str, str]) -> Row:
    """Questions of one split whose document lies elsewhere, and those without a usable gold passage or answer."""
    row = {"questions": 0, "questions_astray": 0, "gold_wrong": 0}
    for question in read_lines(path) if path.is_file() else ():
        row["questions"] += 1
        row["questions_astray"] += int(split_of.get(question["document_id"]) != split)
        listed = range(len(question["passages"]))
        sound = question["answers"] and question["gold"] and all(index in listed for index in question["gold"])
        row["gold_wrong"] += int(not sound)
    return row


def shard_name(shard: int | str) -> str:
    """File name of a shard as documents.parquet refers to it."""
    return f"tokens-{shard:05d}.bin" if isinstance(shard, int) else Path(shard).name


def _columns(path: Path, *names: str) -> list[list[Any]]:
    """Columns of a Parquet file as lists; only these columns are read."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=list(names))
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path.name} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    return [table.column(name).to_pylist() for name in names]


TABLES: dict[str, Table] = {"files": files, "shards": shards, "splits": splits}
