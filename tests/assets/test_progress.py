"""The course of a training, as the run's log tells it."""

import json
from pathlib import Path

from assets.progress import Course


def write(path: Path, *steps: int) -> None:
    rows = [{"step": step, "loss": 5 - step / 10, "tokens_per_second": 2000.4} for step in steps]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')


def test_each_line_is_told_once_with_the_time_that_is_left(tmp_path: Path) -> None:
    path, now = tmp_path / "metrics.jsonl", 0.0
    course = Course([path], 400, lambda: now)
    assert course.new_lines() == []
    write(path, 1)
    assert course.new_lines() == ["step 1 of 400: loss 4.9000, 2,000 tokens/s"]
    now = 20.0
    write(path, 1, 11)
    assert course.new_lines() == ["step 11 of 400: loss 3.9000, 2,000 tokens/s, 12 min 58 s left"]
    assert course.new_lines() == []
    write(path, 1)  # killed, and gone on from an earlier checkpoint
    assert course.new_lines() == []
    write(path, 1, 11)
    assert len(course.new_lines()) == 1


def test_a_short_training_is_told_from_what_it_published(tmp_path: Path) -> None:
    state, published = tmp_path / "state.jsonl", tmp_path / "published.jsonl"
    write(published, 1, 2, 3)  # of the version before
    course = Course([state, published], 3)
    assert len(course.new_lines()) == 3
    write(state, 1)
    assert course.new_lines() == []
    state.unlink()
    assert [line.split(":")[0] for line in course.new_lines()] == ["step 2 of 3", "step 3 of 3"]
