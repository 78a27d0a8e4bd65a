"""Rows of the throughput benchmark on a tiny shape."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from refrag_platform.bench import throughput
from refrag_platform.bench.clock import Ceilings
from refrag_platform.bench.shapes import named_shape
from refrag_platform.bench.throughput import ThroughputPlan, bench_throughput
from refrag_platform.errors import RefragError

PLAN = ThroughputPlan(context=64, question=8, new_tokens=4, ks=(8,), runs=2, largest=3, seed=0)
POSITION = 2 * 2 * 2 * 16 * 4


class Wrapped(Exception):
    """As the compiler raises what its trials run into."""

    inner_exception = torch.OutOfMemoryError()


@pytest.fixture(autouse=True)
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given, not measured: that takes longer than all else here."""
    monkeypatch.setattr(Ceilings, "measure", lambda *_: Ceilings(1e11, 1e10))


def test_rows_count_every_new_token_of_the_batch() -> None:
    result = bench_throughput(named_shape("tiny", torch.device("cpu"), torch.float32), PLAN)
    full, refrag = result["rows"]
    assert (full["system"], refrag["system"], refrag["k"]) == ("full", "refrag", 8)
    for row, positions in ((full, 72), (refrag, 16)):
        assert row["batch"] == 3
        assert row["tokens_per_second"] == pytest.approx(3 * 4 / row["seconds"], rel=0.05)
        # The last new token is never read.
        assert row["kv_bytes"] == 3 * (positions + 3) * POSITION
        low, high = row["spread"]["tokens_per_second"]
        assert low <= row["tokens_per_second"] <= high
    assert refrag["speedup"] == pytest.approx(refrag["tokens_per_second"] / full["tokens_per_second"], rel=1e-2)


def test_a_batch_that_does_not_fit_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measure(_subject: Any, _plan: Any, k: int | None, batch: int, _ceilings: Any) -> dict[str, Any]:
        tried.append(batch)
        if batch > (2 if k is None else 28):
            raise torch.OutOfMemoryError if batch % 2 else Wrapped
        return {"system": "refrag" if k else "full", "batch": batch, "tokens_per_second": float(batch)}

    monkeypatch.setattr(throughput, "_measure", measure)
    monkeypatch.setattr(throughput, "_free_bytes", lambda _: 32 * 21 * POSITION)
    rows = bench_throughput(named_shape("tiny", torch.device("cpu"), torch.float32), replace(PLAN, largest=64))["rows"]
    assert tried == [8, 7, 6, 5, 4, 3, 2, 32, 30, 28]
    assert [row["batch"] for row in rows] == [2, 28]


def test_a_context_that_never_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_free_bytes", lambda _: 100)
    with pytest.raises(RefragError, match="not even one request of 76 positions fits"):
        bench_throughput(named_shape("tiny", torch.device("cpu"), torch.float32), PLAN)
