"""Summary rows of a corpus: one per shard and one per split, counted from the files themselves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from refrag_platform.corpus.shards import INDEX, shard_name
from refrag_platform.errors import ArtifactError
from refrag_platform.quality.summaries.artifact import Artifact, SummaryRow, read_lines, wanted

SPLITS = ("train", "validation", "test")
TOKENS_AT_ONCE = 1 << 22


def files(artifact: Artifact) -> list[SummaryRow]:
    """Shards of each split, documents, passages, questions, facts and the tokenizer."""
    names = [f"{split}/{name}" for split in SPLITS for name in ("tokens-*.bin", INDEX)]
    names += ["documents.parquet", "passages.parquet", "corpus.json", "tokenizer.json"]
    if artifact.recipe.corpus.questions_per_document and any(
        source.kind == "factbook" for source in artifact.recipe.corpus.sources
    ):
        names += [f"questions/{split}.jsonl" for split in SPLITS]
    return artifact.files(names)


def shards(artifact: Artifact) -> list[SummaryRow]:
    """One row per shard that is there or due: tokens, tokens due to documents, ids outside the vocabulary."""
    import numpy as np

    facts = artifact.read_json("corpus.json")
    vocabulary, size = (wanted(facts, key, "corpus.json") for key in ("vocabulary", "shard_tokens"))
    dtype = np.dtype(wanted(facts, "dtype", "corpus.json")).newbyteorder("<")
    total: Counter[str] = Counter()
    for split, tokens in zip(*_columns(artifact.content / "documents.parquet", "split", "tokens"), strict=True):
        total[split] += tokens
    due = {
        f"{split}/{shard_name(number)}": min(size, total[split] - number * size)
        for split in SPLITS
        for number in range(-(-total[split] // size))
    }
    present = {path.relative_to(artifact.content).as_posix() for path in artifact.content.glob("*/tokens-*.bin")}
    rows = []
    for name in sorted(present | due.keys()):
        path = artifact.content / name
        whole = path.is_file() and path.stat().st_size >= dtype.itemsize
        ids = np.memmap(path, dtype, "r") if whole else np.empty(0, dtype)
        blocks = [ids[start : start + TOKENS_AT_ONCE] for start in range(0, len(ids), TOKENS_AT_ONCE)]
        rows.append(
            {
                "row": name,
                "tokens": len(ids),
                "tokens_due": due.get(name, 0),
                "outside_vocabulary": sum(int((block >= vocabulary).sum()) for block in blocks),
            }
        )
    return rows


def splits(artifact: Artifact) -> list[SummaryRow]:
    """One row per split: documents, tokens, lengths, duplicates, leakage, passages and questions astray."""
    names = ("id", "sha256", "split", "shard", "start", "tokens", "characters")
    columns = _columns(artifact.content / "documents.parquet", *names)
    marks: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    count: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    split_of: dict[str, str] = {}
    places: dict[str, list[tuple[int, int]]] = {split: [] for split in SPLITS}
    facts = artifact.read_json("corpus.json")
    size, stated = (wanted(facts, key, "corpus.json") for key in ("shard_tokens", "tokens"))
    for identity, sha256, split, shard, start, tokens, characters in zip(*columns, strict=True):
        places[split].append((shard * size + start, tokens))
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
    rows = []
    for split in SPLITS:
        elsewhere = set().union(*(marks[other] for other in SPLITS if other != split))
        rows.append(
            {
                "row": split,
                "documents": count[split]["documents"],
                "tokens": count[split]["tokens"],
                "tokens_stated": stated.get(split, 0),
                "misplaced": _misplaced(artifact.content, split, places[split]),
                "empty": count[split]["empty"],
                "duplicates": sum(times - 1 for times in marks[split].values()),
                "leaked": sum(mark in elsewhere for mark in marks[split]),
                "passages_astray": astray[split],
                **_questions(artifact.content / "questions" / f"{split}.jsonl", split, split_of),
            }
        )
    return rows


def _questions(path: Path, split: str, split_of: dict[str, str]) -> SummaryRow:
    """Questions of one split whose document lies elsewhere, and those without gold passage or answer."""
    row = {"questions_astray": 0, "gold_wrong": 0}
    for question in read_lines(path) if path.is_file() else ():
        row["questions_astray"] += int(split_of.get(question["document_id"]) != split)
        gold, listed = question["gold"], range(len(question["passages"]))
        sound = question["answers"] and gold and all(index in listed for index in gold)
        row["gold_wrong"] += int(not sound)
    return row


def _misplaced(content: Path, split: str, places: list[tuple[int, int]]) -> int:
    """Documents (start, tokens) that do not follow the one before, or that the split's index has elsewhere."""
    import numpy as np

    index = [tuple(row) for row in np.load(content / split / INDEX).tolist()]
    ends = [0, *(start + tokens for start, tokens in sorted(places))]
    gaps = sum(start != end for (start, _), end in zip(sorted(places), ends, strict=False))
    return gaps + len(set(index) ^ set(places))


def _columns(path: Path, *names: str) -> list[list[Any]]:
    """Columns of a Parquet file as lists; only these columns are read."""
    import pyarrow.parquet as pq

    columns = pq.read_schema(path).names
    if missing := [name for name in names if name not in columns]:
        raise ArtifactError(f"{path.name} has no column {', '.join(missing)}; it has {', '.join(columns)}")
    table = pq.read_table(path, columns=list(names))
    return [table.column(name).to_pylist() for name in names]
