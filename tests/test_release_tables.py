"""scripts/release_tables.py: jobs in the order of what they need, runs that go on, results without answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.conftest import load_script


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(monkeypatch, "release_tables")


def job(tables: ModuleType, folder: Path, name: str, *needs: str, code: str = "pass") -> Any:
    """Says its name in a file that all share, and makes its own."""
    made = folder / f"{name}.json"
    says = f"open({str(folder / 'said')!r}, 'a').write({name!r} + chr(10)); {code}; open({str(made)!r}, 'w').close()"
    return tables.Job(name, [sys.executable, "-c", says], made, needs)


def test_jobs_wait_for_what_they_need_and_are_not_done_twice(tables: ModuleType, tmp_path: Path) -> None:
    work = [job(tables, tmp_path, "last", "middle"), job(tables, tmp_path, "middle", "first")]
    work.append(job(tables, tmp_path, "first"))
    assert tables.run_jobs(work, 2, tmp_path / "logs") == []
    assert (tmp_path / "said").read_text().split() == ["first", "middle", "last"]
    (tmp_path / "last.json").unlink()
    assert tables.run_jobs(work, 2, tmp_path / "logs") == []
    assert (tmp_path / "said").read_text().split() == ["first", "middle", "last", "last"]


def test_what_needs_a_failed_job_is_named_and_the_rest_is_done(
    tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = [job(tables, tmp_path, "bad", code="raise SystemExit('no such pool')"), job(tables, tmp_path, "good")]
    work.append(job(tables, tmp_path, "after", "bad", "good"))
    assert tables.run_jobs(work, 1, tmp_path / "logs") == ["bad", "after"]
    assert "bad: ended with status 1" in capsys.readouterr().out
    assert "no such pool" in (tmp_path / "logs" / "bad.log").read_text()
    assert (tmp_path / "good.json").exists() and not (tmp_path / "after.json").exists()


def test_every_job_needs_jobs_that_are_there(tables: ModuleType, tmp_path: Path) -> None:
    base, runs, data = (tmp_path / name for name in ("base", "runs", "data"))
    work = [*tables.prepared(base, runs, data, tmp_path), tables.control(base, runs, data, 8, ["batch_size=2"])]
    work += tables.asked(base, runs, data, tmp_path / "answers", 8, 3)
    names = [one.name for one in work]
    assert len(set(names)) == len(names)
    assert {need for one in work for need in one.needs} <= set(names)
    counts = {one.name: int(one.command[one.command.index("--limit") + 1]) for one in work if "--limit" in one.command}
    assert counts["nq"] == counts["pool-05"] == 3, "three of each file, to try it"
    whole = list(tables.asked(base, runs, data, tmp_path / "answers", 8, None))
    assert [one.command[-1] for one in whole if one.name == "nq-weak"] == ["200"]
    tuned = next(one.command for one in work if one.name == "control")
    assert tuned.index("batch_size=2") > tuned.index("batch_size=64"), "the later one counts"


def test_results_have_no_answers_and_the_pool_is_one(tables: ModuleType, tmp_path: Path) -> None:
    for count in (5, 10):
        own = {"rows": [{"passages": count}], "intervals": [], "differences": [{"passages": count}]}
        result = own | {"parts": {"/d/nq-pool.jsonl": own | {"questions_used": 2}}, "answers": [{"answer": "no"}]}
        result |= {"questions": "/d/nq-pool.jsonl, /d/squad-pool.jsonl", "distractors": None, "model": "/r/model"}
        (tmp_path / f"pool-{count:02d}.json").write_text(json.dumps(result))
    tables.collect(tmp_path, tmp_path / "results", "models/smollm2-135m/release")
    (made,) = (tmp_path / "results").iterdir()
    found = json.loads(made.read_text())
    assert made.name == "rag-pool.json" and found["questions"] == "nq-pool.jsonl, squad-pool.jsonl"
    assert "answers" not in found and found["distractors"] is None and found["model"] == "models/smollm2-135m/release"
    for own in (found, found["parts"]["nq-pool.jsonl"]):
        assert [row["passages"] for row in own["rows"]] == [row["passages"] for row in own["differences"]] == [5, 10]


def test_ranked_questions_are_copied_with_other_answers(tables: ModuleType, tmp_path: Path) -> None:
    def row(name: str, answer: str) -> dict[str, Any]:
        gold = {"title": name, "text": f"The area is {answer} km."}
        other = {"title": "Oz", "text": "There is none."}
        asked = f"What is the area of {name}?"
        return {"id": name, "question": asked, "answers": [answer], "passages": [other, gold], "gold": [1]}

    rows = [row("a", "12"), row("b", "34")]
    for name, more in (("own", {"field": "area"}), ("ranked", {})):
        (tmp_path / name).write_text("".join(json.dumps(one | more) + "\n" for one in rows))
    files = [str(tmp_path / name) for name in ("own", "ranked", "out")]
    assert CliRunner().invoke(tables.app, ["swap", *files]).exit_code == 0
    made = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert len(made) == 2 * tables.SWAPPED_COPIES
    (tmp_path / "own").write_text((tmp_path / "out").read_text())
    again = CliRunner().invoke(tables.app, ["swap", *files])
    assert again.exit_code == 2, "copies of copies"
    for one in made:
        assert one["answers"] == ["34" if one["id"].startswith("a") else "12"]
        assert one["answers"][0] in one["passages"][1]["text"]
