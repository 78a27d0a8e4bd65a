"""`refrag bench search`: exact search and an index asked the same questions, and the table of it."""

from pathlib import Path
from typing import Any

import pytest

from refrag_platform.bench.report import result_tables
from refrag_platform.bench.search import bench_search
from refrag_platform.store.retriever import HashedWords
from tests.store.conftest import Made


@pytest.mark.slow
def test_exact_search_and_an_index_stand_side_by_side(made: Made, tmp_path: Path) -> None:
    questions = [f"Which country has the capital Town{number}?" for number in range(3)]
    shown: list[dict[str, Any]] = []
    result = bench_search(made.content, HashedWords(), questions, [900], ["IVF_RQ"], tmp_path, 0, shown.append)
    assert result["rows"] == shown and [row["index"] for row in shown] == ["none", "IVF_RQ"]
    assert shown[0]["recall"] == 1.0 and shown[1]["recall"] >= 0.95
    assert shown[0]["index_bytes"] == 0 < shown[1]["index_bytes"] < shown[1]["disk_bytes"]
    tables = result_tables(result)
    assert "600 passages of tiny" in tables and "3 questions" in tables
    assert tables.count("| 900 | ") == 2
    assert list(tmp_path.iterdir()) == [], "the stores are removed"
