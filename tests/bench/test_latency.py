"""Rows of the latency benchmark on a tiny shape: complete, exact where they can be, consistent everywhere."""

from typing import Any

import pytest
import torch
import yaml

from refrag_platform.bench.cepe import Cepe
from refrag_platform.bench.latency import bench_latency
from refrag_platform.bench.shapes import named_shape, project_model
from refrag_platform.bench.systems import SYSTEMS, LatencyPlan
from refrag_platform.bench.vectors import StoredVectors, encode_passages
from refrag_platform.decoding.runner import DecoderRunner
from refrag_platform.errors import RefragError
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks
from refrag_platform.project import Project

CPU = torch.device("cpu")
COLUMNS = {
    "system",
    "k",
    "context",
    "ttft_ms",
    "ttft_cached_ms",
    "ttft_uncached_ms",
    "ttft_speedup_cached",
    "ttft_speedup_uncached",
    "ttit_ms",
    "kv_bytes",
    "formula",
    "limit",
    "runs",
    "spread",
}
# Two layers, keys and values, two heads of 16 numbers, four bytes each.
POSITION = 2 * 2 * 2 * 16 * 4


def plan(**changes: Any) -> LatencyPlan:
    settings = {"context": 64, "question": 8, "ks": (4, 8), "systems": SYSTEMS, "runs": 3, "warmup": 1, "seed": 0}
    return LatencyPlan(**{**settings, **changes})


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return bench_latency(named_shape("tiny", CPU, torch.float32), [plan(), plan(context=128)])


def rows_of(result: dict[str, Any], system: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["system"] == system]


def test_every_system_has_a_row_at_every_context(result: dict[str, Any]) -> None:
    found = [(row["context"], row["system"], row["k"]) for row in result["rows"]]
    systems = [("full", None), ("refrag", 4), ("refrag", 8), ("cepe", None), ("prefix", None)]
    assert found == [(context, *system) for context in (64, 128) for system in systems]
    assert all(row.keys() >= COLUMNS for row in result["rows"])


def test_key_value_bytes_are_those_of_the_positions_read(result: dict[str, Any]) -> None:
    kept = {(row["system"], row["k"]): row["kv_bytes"] for row in result["rows"] if row["context"] == 128}
    assert kept[("full", None)] == kept[("prefix", None)] == kept[("cepe", None)] == (128 + 8) * POSITION
    assert kept[("refrag", 4)] == (32 + 8) * POSITION
    assert kept[("refrag", 8)] == (16 + 8) * POSITION
    for row in rows_of(result, "full") + rows_of(result, "refrag"):
        assert row["formula"]["kv_bytes"] == row["kv_bytes"]


def test_speed_ups_are_against_the_full_context_of_the_same_length(result: dict[str, Any]) -> None:
    full = {row["context"]: row["ttft_ms"] for row in rows_of(result, "full")}
    for row in result["rows"]:
        for kind in ("", "_cached", "_uncached"):
            time, gain = row[f"ttft{kind}_ms"], row[f"ttft_speedup{kind}"]
            assert (gain is None) == (time is None)
            if time is not None:
                assert gain == pytest.approx(full[row["context"]] / time, rel=1e-2, abs=1e-3)


def test_medians_lie_within_their_spread(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert row["runs"] == 3
        for name, (low, high) in row["spread"].items():
            assert 0 < low <= row[name] <= high
        assert all(least > 0 for least in row["limit"].values())


def test_refrag_is_timed_from_the_store_cached_and_uncached(result: dict[str, Any]) -> None:
    for row in rows_of(result, "refrag"):
        times = ("ttft_ms", "ttft_cached_ms", "ttft_uncached_ms", "store_fetch_ms")
        assert all(row[name] > 0 for name in times)
        assert row["projection"] == "random"
        assert row["formula"]["ttft_speedup_cached"] > 1


def test_a_chunk_size_that_the_model_lacks_has_a_random_projection_and_says_so(project: Project) -> None:
    subject = project_model("tiny", CPU, torch.float32, project)
    rows = bench_latency(subject, [plan(systems=("refrag",))])["rows"]
    assert [(row["k"], row["projection"]) for row in rows] == [(4, "untrained"), (8, "random")]
    assert all(row["ttft_speedup_cached"] is None for row in rows)
    assert subject.at(8)[0].token_table is subject.encoder.token_table


PASSAGES = {"window": "passage", "window_tokens": 32}
LAYERS = PASSAGES | {"source": "decoder", "layers": 1, "config": {}, "train_token_table": False}


def read_passages(project: Project, encoder: dict[str, Any]) -> None:
    """Make tiny's encoder one that reads whole passages."""
    file = project.recipe_path("tiny")
    recipe = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(recipe | {"encoder": recipe["encoder"] | encoder}))


@pytest.mark.parametrize("encoder", [PASSAGES, LAYERS], ids=["a BERT", "the decoder's layers"])
def test_an_encoder_of_whole_passages_is_measured_beside_the_full_context(
    encoder: dict[str, Any], project: Project
) -> None:
    read_passages(project, encoder)
    rows = bench_latency(project_model("tiny", CPU, torch.float32, project), [plan(context=96)])["rows"]
    assert [(row["system"], row["k"]) for row in rows] == [
        ("full", None), ("refrag", 4), ("refrag", 8), ("cepe", None), ("prefix", None)
    ]  # fmt: skip
    for row in rows[1:3]:
        times = ("ttft_ms", "ttft_cached_ms", "ttft_uncached_ms", "ttft_speedup_uncached", "store_fetch_ms")
        assert all(row[name] > 0 for name in times)
        assert row["limit"]["ttft_uncached_ms"] > row["limit"]["ttft_cached_ms"]
    assert [(row["projection"], row["passage_tokens"]) for row in rows[1:3]] == [("untrained", 64), ("random", 96)]


@torch.inference_mode()
@pytest.mark.parametrize("encoder", [PASSAGES, LAYERS], ids=["a BERT", "the decoder's layers"])
def test_passages_are_encoded_as_they_are_served(encoder: dict[str, Any], project: Project) -> None:
    read_passages(project, encoder)
    model = RefragModel.create(project.recipe("tiny"), project.recipe_path("tiny").parent).eval()
    # It starts at zero, and what the layers say would not be heard.
    torch.nn.init.normal_(model.encoder.pool.weight)
    ids = torch.randint(1000, (40, 4), generator=torch.Generator().manual_seed(0))
    vectors = encode_passages(model.encoder, ids)
    served = model.with_vectors([Chunks(part) for part in ids.split(16)])
    assert torch.allclose(vectors, torch.cat([passage.compressed_vectors() for passage in served]), atol=1e-5)
    alone = model.encode(ids[:, None], padded=False)[:, 0]
    # Layers of the decoder see of a passage what stands before.
    assert torch.allclose(vectors[::16], alone[::16], atol=1e-5) == (encoder is LAYERS)
    assert not torch.allclose(vectors[1::16], alone[1::16], atol=1e-5)


def test_what_cant_be_measured_is_refused() -> None:
    subject = named_shape("tiny", CPU, torch.float32)
    with pytest.raises(RefragError, match="context 64 is no multiple of k = 7"):
        bench_latency(subject, [plan(ks=(7,))])
    with pytest.raises(RefragError, match="no system 'half'"):
        bench_latency(subject, [plan(systems=("half",))])


@torch.inference_mode()
def test_cepe_reads_the_context_and_steps_as_it_prefills() -> None:
    subject = named_shape("tiny", CPU, torch.float32)
    cepe = Cepe(subject.decoder, subject.encoder, context=70)
    runner = DecoderRunner(cepe.decoder, max_positions=9)
    question = torch.arange(9)
    embeds = subject.decoder.get_input_embeddings()(question)
    logits = []
    for seed in (0, 1):
        cepe.read(cepe.encode(torch.randint(1000, (70,), generator=torch.Generator().manual_seed(seed))))
        logits.append(runner.prefill(embeds, 0))
    assert not torch.allclose(*logits)
    runner.prefill(embeds[:8], 0)
    assert torch.allclose(runner.decode([8], [0], [8])[0], logits[1], atol=1e-5)
    kept = sum(cross.keys.nbytes + cross.values.nbytes for cross in cepe.cross)
    assert cepe.kv_bytes(9) == kept + 9 * runner.kv_bytes_per_position


def test_stored_vectors_are_fetched_by_passage(tmp_path: Any) -> None:
    stored = StoredVectors(tmp_path / "vectors.safetensors", rows=40, dim=6, seed=0)
    before = stored.fetch()
    stored.evict()
    assert before.shape == (40, 6) and before.dtype == torch.float16
    assert torch.equal(stored.fetch(), before)
    assert [end - start for start, end in stored.ranges] == [16, 16, 8]
