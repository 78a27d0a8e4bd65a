"""The chunks stage: what it writes, in which pieces, and what a kill leaves."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.model import precision
from refrag_platform.model.prompts import passage_text
from refrag_platform.model.refrag import RefragModel
from refrag_platform.store import build as stage
from refrag_platform.store.content import StoreDescription
from refrag_platform.store.retriever import HashedWords
from tests.conftest import ROOT
from tests.encoders import ENCODERS, WHOLE_PASSAGES, least_cosine, model_with
from tests.store.conftest import PASSAGES, Made, text_of, write_passages

# The build kills itself: another process that saw the first part could come too late.
DIES_AFTER_A_PART = """
import os, signal
from refrag_platform.store import build

save = build._save
build._save = lambda *given: (save(*given), os.kill(os.getpid(), signal.SIGKILL))
"""


def test_every_passage_has_the_chunks_of_its_text_and_their_vectors(made: Made) -> None:
    passages = pq.read_table(made.content / "passages.parquet").to_pylist()
    stored = load_file(made.content / "chunks-00000.safetensors")
    assert len(passages) == PASSAGES
    end = 0
    for row in passages:
        assert row["chunk_start"] == end
        end += row["chunk_count"]
    assert end == len(stored["token_ids"]) == len(stored["vectors"])
    row = passages[417]
    where = slice(row["chunk_start"], row["chunk_start"] + row["chunk_count"])
    token_ids = stored["token_ids"][where]
    kept = token_ids[token_ids >= 0].tolist()
    assert made.model.tokenizer.decode(kept) == passage_text(row["title"], row["text"])
    with torch.inference_mode():
        vectors = made.model.encode(torch.tensor(token_ids).long())
    assert least_cosine(stored["vectors"][where], vectors) > 0.999


@pytest.mark.parametrize("encoder", WHOLE_PASSAGES)
def test_a_passage_s_chunks_are_encoded_together(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    # What the window says of a tiny model's chunks is not far above the rounding of bfloat16.
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    model, context = model_with(encoder), made.context(tmp_path / "run")
    context.inputs |= {"corpus": tmp_path / "corpus", "finetuned": tmp_path / "finetuned"}
    write_passages(context.inputs["corpus"], 20)
    context.inputs["finetuned"].mkdir()
    model.save(context.inputs["finetuned"])
    stage.build_chunks(context)
    stored = load_file(context.out / "chunks-00000.safetensors")
    ends = np.cumsum(pq.read_table(context.out / "passages.parquet")["chunk_count"].to_numpy())
    for token_ids, vectors in zip(
        *(np.split(stored[name], ends[:-1]) for name in ("token_ids", "vectors")), strict=True
    ):
        with torch.inference_mode():
            own = model.encode(torch.tensor(token_ids).long())
            np.testing.assert_allclose(vectors, own.numpy(), atol=0.01)
            assert not np.allclose(vectors[1:], model.encode(torch.tensor(token_ids[1:]).long()).numpy(), atol=0.05)
    with pytest.raises(ArtifactError, match="made by encoder"):
        StoreDescription.read(context.out).require_encoder(made.model.encoder_digest())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_vectors_in_bfloat16_are_float32_s_within_rounding_whatever_their_batch(
    monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    model = model_with(encoder)
    passages = [(f"Country{number}", text_of(number) * (1 + number % 4)) for number in range(12)]

    def encoded(bf16: bool, batch_size: int) -> torch.Tensor:
        monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: bf16)
        arrays = stage.encode_passages(model, HashedWords(), passages, batch_size, "of the test")
        return torch.from_numpy(arrays["vectors"])

    exact, rounded, again, alone = (encoded(*how) for how in ((False, 256), (True, 256), (True, 256), (True, 1)))
    assert torch.equal(rounded, again) and not torch.equal(rounded, exact)
    assert min(least_cosine(rounded, exact), least_cosine(alone, exact)) > 0.999


def test_the_description_names_the_encoder_that_made_the_vectors(made: Made) -> None:
    description = StoreDescription.read(made.content)
    assert description.encoder_digest == made.model.encoder_digest()
    assert (description.chunk_size, description.vector_dim) == (made.model.chunk_size, made.model.vector_dim)
    assert description.chunks == sum(description.files.values())


def test_building_again_gives_the_same_bytes(made: Made, build: Callable[[str], Path]) -> None:
    assert folder_digest(build("again")) == folder_digest(made.content)


def test_chunk_files_are_of_bounded_size_and_join_to_the_same_chunks(
    made: Made, build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(made.content / "chunks-00000.safetensors")
    monkeypatch.setattr(stage, "CHUNKS_PER_FILE", 5000)
    content = build("small-files")
    files = StoreDescription.read(content).files
    assert len(files) > 1
    assert all(size <= 5000 for size in files.values())
    joined = np.concatenate([load_file(content / name)["token_ids"] for name in files])
    np.testing.assert_array_equal(joined, whole["token_ids"])


def test_a_killed_run_continues_with_the_parts_it_had_finished(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    context = made.context(folder)
    killed = subprocess.run(
        made.command("build", "build_chunks", folder, before=DIES_AFTER_A_PART), cwd=ROOT, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    finished = {path.name: path.stat().st_ino for path in context.work.glob("part-*.safetensors")}
    assert len(finished) == 1
    assert not (context.out / "store.json").exists()
    stage.build_chunks(context)
    assert {name: (context.work / name).stat().st_ino for name in finished} == finished
    assert folder_digest(context.out) == folder_digest(made.content)


def test_a_half_written_part_is_not_taken_for_a_whole_one(made: Made, tmp_path: Path) -> None:
    context = made.context(tmp_path / "half")
    (context.work / "part-000000.partial").write_bytes(b"half")
    stage.build_chunks(context)
    assert folder_digest(context.out) == folder_digest(made.content)


def test_vectors_that_do_not_fit_are_refused(made: Made, tmp_path: Path) -> None:
    broken = RefragModel.load(made.project.content("finetuned", "tiny"))
    with torch.no_grad():
        broken.encoder.skip.weight.fill_(torch.inf)
    context = made.context(tmp_path / "run")
    context.inputs["finetuned"] = tmp_path / "finetuned"
    context.inputs["finetuned"].mkdir()
    broken.save(context.inputs["finetuned"])
    with pytest.raises(RefragError, match="don't fit float16"):
        stage.build_chunks(context)


def test_a_corpus_without_passages_is_refused(made: Made, tmp_path: Path) -> None:
    context = made.context(tmp_path / "run")
    context.inputs["corpus"] = tmp_path / "corpus"
    write_passages(tmp_path / "corpus", 1)
    table = pq.read_table(tmp_path / "corpus" / "passages.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "corpus" / "passages.parquet")
    with pytest.raises(ArtifactError, match="has no passages"):
        stage.build_chunks(context)
