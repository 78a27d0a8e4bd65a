"""Every fault that a suite is there for, planted in an artifact's files, fails its check; sound artifacts pass."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from refrag_platform.quality.results import read_results
from refrag_platform.quality.suites import SUITES
from refrag_platform.stages import STAGES
from tests.quality.conftest import Examine, Plant

Row = dict[str, Any]


def in_rows(name: str, change: Callable[[list[Row]], None]) -> Plant:
    """Change the rows of a Parquet file."""

    def plant(content: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = pq.read_table(content / name).to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows), content / name)

    return plant


def in_json(name: str, change: Callable[[Row], object]) -> Plant:
    """Change the values of a JSON file."""

    def plant(content: Path) -> None:
        values = json.loads((content / name).read_text())
        change(values)
        (content / name).write_text(json.dumps(values))

    return plant


def in_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Plant:
    """Change the tensors of a safetensors file."""

    def plant(content: Path) -> None:
        tensors = load_file(content / name)
        change(tensors)
        save_file(tensors, content / name)

    return plant


def removed(name: str) -> Plant:
    return lambda content: (content / name).unlink()


def cut_in_half(name: str) -> Plant:
    return lambda content: (content / name).write_bytes((content / name).read_bytes()[:-8])


def foreign_token(content: Path) -> None:
    ids = np.memmap(content / "test" / "tokens-00000.bin", "<u2", "r+")
    ids[7] = 65_535
    ids.flush()


def set_row(number: int, **values: Any) -> Callable[[list[Row]], None]:
    return lambda rows: rows[number].update(values)


def of_systems(values: Row, *systems: str) -> list[Row]:
    return [row for row in values["rows"] if row["system"] in systems]


def drop_system(system: str) -> Callable[[Row], None]:
    return lambda values: values.update(rows=[row for row in values["rows"] if row["system"] != system])


def give(systems: str, **figures: Any) -> Callable[[Row], None]:
    return lambda values: [row.update(figures) for row in of_systems(values, systems)] and None


def looked_up(**rates: float | None) -> Callable[[Row], None]:
    return lambda values: values["retrieval"]["lookups"][0].update(rates)


def collapse(tensors: dict[str, torch.Tensor]) -> None:
    """The encoder says the same of every chunk, and the projection passes it on."""
    for name, tensor in tensors.items():
        if name in {"encoder.skip.weight", "encoder.pool.weight"}:
            tensor.zero_()
    tensors["encoder.pool.bias"].fill_(1.0)


FAULTS: list[tuple[str, str, Plant]] = [
    ("corpus", "files_complete", removed("tokenizer.json")),
    ("corpus", "token_id_range", foreign_token),
    ("corpus", "shard_lengths", cut_in_half("train/tokens-00000.bin")),
    ("corpus", "shard_lengths", removed("train/tokens-00001.bin")),
    ("corpus", "document_places", in_rows("documents.parquet", set_row(1, start=0))),
    ("corpus", "splits_filled", in_rows("documents.parquet", lambda rows: rows.__delitem__(slice(8, 12)))),
    ("corpus", "documents_filled", in_rows("documents.parquet", set_row(3, characters=0))),
    ("corpus", "duplicates", in_rows("documents.parquet", set_row(1, sha256="hash of train-0"))),
    ("corpus", "split_leakage", in_rows("documents.parquet", set_row(9, sha256="hash of train-0"))),
    ("corpus", "split_leakage", in_rows("documents.parquet", set_row(9, id="train-0"))),
    ("corpus", "counts", in_json("corpus.json", lambda facts: facts["tokens"].update(test=1))),
    ("corpus", "passages_placed", in_rows("passages.parquet", set_row(0, split="test"))),
    ("corpus", "questions_gold", lambda c: _first_question(c, gold=[5])),
    ("corpus", "questions_placed", lambda c: _first_question(c, document_id="test-1")),
    (
        "chunks",
        "one_vector_per_chunk",
        in_tensors("chunks-00000.safetensors", lambda t: t.update(vectors=t["vectors"][1:].clone())),
    ),
    ("chunks", "vectors_finite", in_tensors("chunks-00000.safetensors", lambda t: t["vectors"][3, 2].fill_(torch.inf))),
    ("chunks", "vector_norms", in_tensors("chunks-00000.safetensors", lambda t: t["vectors"][3].zero_())),
    (
        "chunks",
        "vectors_not_collapsed",
        in_tensors("chunks-00000.safetensors", lambda t: t["vectors"].copy_(t["vectors"][:1].clone())),
    ),
    ("chunks", "token_id_range", in_tensors("chunks-00000.safetensors", lambda t: t["token_ids"][0, 0].fill_(10**6))),
    ("chunks", "padding", in_tensors("chunks-00000.safetensors", lambda t: t["token_ids"][4, 0].fill_(-1))),
    ("chunks", "chunk_count", in_rows("passages.parquet", lambda rows: rows.pop())),
    ("chunks", "chunk_spans", in_rows("passages.parquet", set_row(2, chunk_start=5))),
    ("chunks", "counts", in_json("store.json", lambda facts: facts.update(passages=99))),
    ("chunks", "duplicates", in_rows("passages.parquet", set_row(1, id="p0"))),
    ("chunks", "encoder_digest", in_json("store.json", lambda facts: facts.update(encoder_digest="another"))),
    ("chunks", "retrieval_vectors", in_rows("passages.parquet", set_row(1, retrieval_vector=[float("nan"), 1.0]))),
    (
        "cpt",
        "weights_finite",
        in_tensors("decoder/model.safetensors", lambda t: t["model.norm.weight"][0].fill_(torch.nan)),
    ),
    ("cpt", "parameter_counts", in_tensors("decoder/model.safetensors", lambda t: t.pop("model.norm.weight"))),
    ("cpt", "vectors_not_collapsed", in_tensors("encoder.safetensors", collapse)),
    ("cpt", "encoder_digest", in_tensors("encoder.safetensors", lambda t: t["encoder.pool.bias"].fill_(1.0))),
    ("cpt", "loss_finite", in_json("training.json", lambda values: values.update(last_loss=float("nan")))),
    ("cpt", "loss_falls", in_json("training.json", lambda values: values.update(last_loss=4.5))),
    ("cpt", "loss_falls", in_json("training.json", lambda values: values.update(loss_before=3.0, loss_after=3.0))),
    ("cpt", "loss_finite", in_json("training.json", lambda values: values.update(loss_after=float("inf")))),
    ("cpt", "steps_taken", in_json("training.json", lambda values: values.update(steps=3))),
    ("reconstruction", "loss_falls", in_json("training.json", lambda values: values.update(last_loss=4.5))),
    ("finetuned", "files_complete", removed("encoder.safetensors")),
    ("policy", "files_complete", removed("policy.safetensors")),
    ("policy", "encoder_digest", in_json("policy.json", lambda facts: facts.update(encoder_digest="another"))),
    ("policy", "scores_finite", in_tensors("policy.safetensors", lambda t: t["head.1.bias"].fill_(torch.nan))),
    ("policy", "scores_differ", in_tensors("policy.safetensors", lambda t: t["head.1.weight"].zero_())),
    ("policy", "budget_kept", in_json("policy.json", lambda facts: facts.update(share_kept=0.9))),
    ("policy", "budget_of_recipe", in_json("policy.json", lambda facts: facts.update(share_kept=0.9))),
    ("evaluation", "perplexity_complete", in_json("perplexity.json", drop_system("refrag_zero"))),
    ("evaluation", "perplexity_finite", in_json("perplexity.json", give("full", P16=None))),
    ("evaluation", "rag_complete", in_json("rag.json", drop_system("refrag_wrong"))),
    ("evaluation", "rag_complete", in_json("rag.json", drop_system("sentences"))),
    ("evaluation", "rag_complete", in_json("rag.json", lambda values: values["rows"].pop())),
    ("evaluation", "rag_f1", in_json("rag.json", give("full", f1=1.5))),
    ("evaluation", "refrag_beats_none", in_json("perplexity.json", give("refrag", P16=4.0))),
    ("evaluation", "refrag_beats_none", in_json("perplexity.json", give("refrag_none", P32=3.0))),
    ("evaluation", "refrag_beats_none", in_json("perplexity.json", give("none", tuned=True, P16=2.9))),
    ("evaluation", "refrag_beats_shuffled", in_json("perplexity.json", give("refrag_shuffled", P16=2.9))),
    ("evaluation", "answers_beat_none", in_json("rag.json", give("refrag", f1=0.2))),
    ("evaluation", "retrieval_complete", in_json("rag.json", lambda values: values.pop("retrieval"))),
    ("evaluation", "retrieval_complete", in_json("rag.json", lambda values: values["retrieval"]["rows"].pop())),
    ("evaluation", "retrieval_complete", in_json("rag.json", lambda values: values["retrieval"]["lookups"].pop())),
    ("evaluation", "hit_rates_rise", in_json("rag.json", looked_up(hit_5=0.4))),
    ("evaluation", "hit_rate_floor", in_json("rag.json", looked_up(hit_1=0.1, hit_5=0.2, hit_10=0.3, hit_20=0.4))),
    ("evaluation", "hit_rate_floor", in_json("rag.json", looked_up(hit_20=None))),
    ("package", "inputs_packed", in_json("package.json", lambda lock: lock["inputs"].update(finetuned="other.dir"))),
]


def _first_question(content: Path, **values: Any) -> None:
    path = content / "questions" / "train.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | values) + "\n")


@pytest.mark.parametrize("stage", STAGES)
def test_a_sound_artifact_passes_every_check(examine: Examine, stage: str) -> None:
    results = examine(stage)
    assert list(results) == [check.name for check in SUITES[stage]]
    assert {name: result.message for name, result in results.items() if not result.passed} == {}


@pytest.mark.parametrize(("stage", "check", "plant"), FAULTS, ids=[f"{stage}-{check}" for stage, check, _ in FAULTS])
def test_a_planted_fault_fails_its_check_and_blocks_a_release(
    examine: Examine, stage: str, check: str, plant: Plant
) -> None:
    result = examine(stage, plant, maturity="released")[check]
    assert not result.passed
    assert result.blocking
    assert result.observed or "can't be checked" in result.message


QUALITY = [
    ("cpt", "loss_falls", in_json("training.json", lambda values: values.update(last_loss=4.5))),
    ("evaluation", "refrag_beats_none", in_json("perplexity.json", give("refrag", P16=4.0))),
    ("evaluation", "hit_rate_floor", in_json("rag.json", looked_up(hit_1=0.1, hit_5=0.2, hit_10=0.3, hit_20=0.4))),
]


@pytest.mark.parametrize(("stage", "check", "plant"), QUALITY, ids=[check for _, check, _ in QUALITY])
def test_a_quality_threshold_only_warns_for_an_undertrained_recipe(
    examine: Examine, stage: str, check: str, plant: Plant
) -> None:
    failed = [result for result in examine(stage, plant).values() if not result.passed]
    assert [result.name for result in failed] == [check]
    assert not failed[0].blocking


def test_a_harder_last_batch_is_no_fault_where_the_same_batches_have_a_lower_loss(examine: Examine) -> None:
    figures = {"first_loss": 0.6, "last_loss": 0.9, "loss_before": 0.7, "loss_after": 0.65}
    assert examine("finetuned", in_json("training.json", lambda values: values.update(figures)))["loss_falls"].passed


def test_chunks_kept_as_tokens_do_not_hide_vectors_that_carry_nothing(examine: Examine) -> None:
    def plant(values: Row) -> None:
        (own,) = of_systems(values, "refrag")
        values["rows"].append(own | {"share_kept": 0.25})
        own.update(P16=4.0)

    assert not examine("evaluation", in_json("perplexity.json", plant))["refrag_beats_none"].passed


def test_a_decoder_that_training_made_worse_at_text_is_not_held_against_the_context(examine: Examine) -> None:
    """The untrained decoder without a context tells what training did to it, not what vectors do for it."""
    results = examine("evaluation", in_json("perplexity.json", give("none", P16=2.0, P32=2.0)))
    assert results["refrag_beats_none"].passed


def test_a_failure_says_whether_the_run_goes_on(examine: Examine) -> None:
    fails = in_json("training.json", lambda values: values.update(last_loss=4.5))
    result = examine("cpt", fails)["loss_falls"]
    assert result.message == (
        "Training must lower the loss. Found cpt: before 4, after 4.5, but before must be above after. "
        "The run goes on; it would end here if the recipe's maturity were released"
    )


def test_a_failure_that_ends_the_run_does_not_say_that_it_goes_on(examine: Examine) -> None:
    fails = in_json("training.json", lambda values: values.update(last_loss=4.5))
    assert "goes on" not in examine("cpt", fails, maturity="released")["loss_falls"].message


def test_what_is_expected_is_a_rule_which_is_true_of_a_failure_too() -> None:
    rules = {check.says for suite in SUITES.values() for check in suite}
    assert [rule for rule in rules if not re.search(r"\b(must|may)\b", rule)] == []


def test_a_message_names_the_row_the_value_and_what_is_allowed(examine: Examine) -> None:
    result = examine("corpus", foreign_token)["token_id_range"]
    assert "test/tokens-00000.bin: 1" in result.message
    assert "outside_vocabulary must be 0" in result.message
    assert result.observed == {"test/tokens-00000.bin": 1}


def test_a_damaged_file_fails_checks_and_raises_nothing(examine: Examine) -> None:
    results = examine("chunks", lambda content: (content / "chunks-00000.safetensors").write_bytes(b"no tensors"))
    assert results["files_complete"].passed
    assert "can't be checked" in results["one_vector_per_chunk"].message
    assert results["one_vector_per_chunk"].blocking


def test_data_docs_and_results_are_written_beside(examine: Examine, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    results = examine("package", docs=docs)
    assert (docs / "index.html").is_file()
    assert list(docs.glob("validations/package/holds/**/*.html"))
    assert read_results(docs) == list(results.values())
