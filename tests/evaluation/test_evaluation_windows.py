"""Windows are held out fairly: whole, apart, spread over documents, the same for the same seed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from refrag_platform.corpus.shards import TokenShards
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.windows import Windows, cut_windows, place_windows, read_documents, split_windows
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project


def test_documents_take_turns_until_they_have_no_room() -> None:
    places = place_windows([100, 9, 35, 20], window=10, count=9, seed=0)
    # Document 1 is too short; 3 has room for two; the others share the rest.
    assert [number for number, _ in places] == [0, 0, 0, 0, 2, 2, 2, 3, 3]


def test_windows_of_a_document_lie_apart_and_evenly() -> None:
    places = place_windows([100], window=10, count=3, seed=0)
    assert places == [(0, 17), (0, 45), (0, 72)]
    filled = place_windows([40], window=10, count=9, seed=0)
    assert filled == [(0, 0), (0, 10), (0, 20), (0, 30)]


def test_the_seed_draws_documents_when_there_are_too_many() -> None:
    first, again, other = (place_windows([50] * 40, 10, 5, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len({number for number, _ in first}) == 5


def test_windows_are_cut_from_the_documents_tokens() -> None:
    documents = [(name, np.arange(start, start + 30)) for name, start in (("a", 0), ("short", 100), ("b", 200))]
    documents[1] = ("short", np.arange(100, 108))
    windows = cut_windows(documents, context_tokens=8, output_tokens=4, count=2, seed=0)
    assert windows.documents == ["a", "b"]
    assert windows.context.tolist() == [list(range(9, 17)), list(range(209, 217))]
    assert windows.output.tolist() == [list(range(17, 21)), list(range(217, 221))]


def test_every_long_document_is_drawn_equally_often() -> None:
    documents = [(str(number), range(20)) for number in range(8)]
    drawn = [name for seed in range(400) for name in cut_windows(documents, 8, 4, 2, seed).documents]
    counts = [drawn.count(str(number)) for number in range(8)]
    assert min(counts) > 65
    assert max(counts) < 135


def test_documents_without_room_are_refused_naming_the_longest() -> None:
    with pytest.raises(RefragError, match=r"no document has the 1,536 tokens .* the longest has 30"):
        cut_windows([("a", range(30))], 1024, 512, 4, 0)


def test_windows_of_a_split_are_those_of_its_shards(evaluation_project: Project) -> None:
    corpus = evaluation_project.content("corpus", "tiny")
    windows = split_windows(corpus, "test", 64, 32, 5, seed=0)
    assert len(windows) == 5
    assert set(windows.documents) == {"0", "1", "2"}
    shards = TokenShards(corpus, "test")
    for tokens, name in zip(windows.tokens.tolist(), windows.documents, strict=True):
        document = shards.document(int(name)).tolist()
        assert any(document[start : start + 96] == tokens for start in range(len(document)))


def test_documents_are_read_from_text_and_from_compressed_json_lines(model: RefragModel, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"Row {number} of the file."}) + "\n" for number in range(3))
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    (tmp_path / "book.txt").write_text("Row 1 of the file.")
    from_rows = list(read_documents(tmp_path / "rows.jsonl.zst", model.tokenizer))
    from_text = list(read_documents(tmp_path / "book.txt", model.tokenizer))
    assert [model.tokenizer.decode(ids) for _, ids in from_rows] == [f"Row {n} of the file." for n in range(3)]
    assert len({name for name, _ in from_rows}) == 3
    np.testing.assert_array_equal(from_text[0][1], from_rows[1][1])
    with pytest.raises(RefragError, match="no documents at"):
        list(read_documents(tmp_path / "absent.txt", model.tokenizer))


def test_shuffled_chunks_come_from_another_document() -> None:
    windows = Windows(torch.zeros(4, 8), ["a", "a", "b", "a"], 4)
    others = windows.of_another_document()
    assert others is not None
    assert all(windows.documents[other] != own for other, own in zip(others, windows.documents, strict=True))
    assert Windows(torch.zeros(2, 8), ["a", "a"], 4).of_another_document() is None
