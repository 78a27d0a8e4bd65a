"""A new store takes over the passages that did not change, and only from a store of the same encoder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from refrag_platform.model.refrag import RefragModel
from refrag_platform.store import build as stage
from refrag_platform.store import reuse
from refrag_platform.store.content import StoreDescription
from refrag_platform.store.reuse import KnownPassages, difference
from tests.store.conftest import PASSAGES, Made, text_of, write_passages


@pytest.fixture
def known(made: Made) -> KnownPassages:
    return KnownPassages(made.content, StoreDescription.read(made.content))


def test_a_passage_is_found_with_its_chunks_and_vectors(made: Made, known: KnownPassages) -> None:
    rows = pq.read_table(made.content / "passages.parquet").to_pylist()
    stored = load_file(made.content / "chunks-00000.safetensors")
    for number in (599, 0, 417, 418):  # in no order, and over the groups of rows
        row = rows[number]
        found = known.find(row["title"], row["text"])
        assert found is not None
        where = slice(row["chunk_start"], row["chunk_start"] + row["chunk_count"])
        for name in ("token_ids", "vectors"):
            np.testing.assert_array_equal(found[name], stored[name][where])
        np.testing.assert_array_equal(found["retrieval_vector"], np.float32(row["retrieval_vector"]))


def test_other_text_is_not_found_even_if_its_hash_is_known(
    made: Made, known: KnownPassages, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert known.find("Country7", "Another text.") is None
    assert known.find("Another title", text_of(7)) is None
    key = reuse._key("Country7", text_of(7))
    monkeypatch.setattr(reuse, "_key", lambda title, text: key)
    assert known.find("Country7", "Another text.") is None


def test_chunks_are_found_in_the_file_that_holds_them(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "CHUNKS_PER_FILE", 5000)
    context = made.context(tmp_path / "small")
    stage.build_chunks(context)
    files = KnownPassages(context.out, StoreDescription.read(context.out))
    whole = KnownPassages(made.content, StoreDescription.read(made.content))
    for number in range(0, PASSAGES, 25):
        one, other = (store.find(f"Country{number}", text_of(number)) for store in (files, whole))
        assert one is not None and other is not None
        np.testing.assert_array_equal(one["vectors"], other["vectors"])


def test_only_new_passages_are_encoded(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    encoded: list[int] = []

    def counted(*arguments: object) -> stage.Arrays:
        encoded.append(arguments[2].num_rows)  # type: ignore[attr-defined]
        return encode(*arguments)  # type: ignore[arg-type]

    encode = stage._encode
    monkeypatch.setattr(stage, "_encode", counted)
    monkeypatch.setattr(stage, "published", lambda *arguments: "the store that `made` has built")
    context = made.context(tmp_path / "more")
    context.inputs["corpus"] = tmp_path / "corpus"
    write_passages(tmp_path / "corpus", PASSAGES + 3)
    stage.build_chunks(context)
    assert encoded == [3]
    assert "keep their vectors" in capfd.readouterr().err
    fresh = made.context(tmp_path / "fresh")
    fresh.inputs["corpus"] = tmp_path / "corpus"
    monkeypatch.setattr(stage, "published", lambda *arguments: None)
    stage.build_chunks(fresh)
    one, other = (load_file(folder / "chunks-00000.safetensors") for folder in (context.out, fresh.out))
    np.testing.assert_array_equal(one["token_ids"], other["token_ids"])
    np.testing.assert_allclose(one["vectors"], other["vectors"], atol=1e-3)
    rows, fresh_rows = (pq.read_table(folder / "passages.parquet").to_pylist() for folder in (context.out, fresh.out))
    assert [row["chunk_start"] for row in rows] == [row["chunk_start"] for row in fresh_rows]


def test_another_encoder_encodes_the_whole_store_and_says_so(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage, "published", lambda *arguments: "the store that `made` has built")
    other = RefragModel.load(made.project.content("finetuned", "tiny"))
    other.encoder.skip.weight.data += 0.1
    context = made.context(tmp_path / "run")
    context.inputs["finetuned"] = tmp_path / "finetuned"
    context.inputs["finetuned"].mkdir()
    other.save(context.inputs["finetuned"])
    stage.build_chunks(context)
    said = capfd.readouterr().err
    assert "the whole chunk store of tiny is encoded again: its encoder digest is" in said
    assert f"{PASSAGES} encoded" in said


def test_every_part_of_who_made_a_store_counts(made: Made) -> None:
    known = StoreDescription.read(made.content)
    assert difference(known, replace(known, model="other", passages=1)) is None
    for name in reuse.WHO:
        why = difference(known, replace(known, **{name: "other"}))
        assert why is not None and why.endswith("now it is other")
