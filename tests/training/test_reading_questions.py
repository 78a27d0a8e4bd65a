"""Reading tasks over questions of files: what stands in their contexts, which are left out, and what is asked."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from refrag_platform.errors import RefragError
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import PAD
from tests.training.reading import batch_of, reading_task

PASSAGES = (
    ("Engines", "The first machine was built by Ada Lovelace in 1843. It stood in London for a while."),
    ("Motors", "In those days Karl Benz lived in Mannheim with his wife Bertha."),
    ("Fossils", "Near Lyme Regis the bones were found by Mary Anning in 1811."),
)
# Two questions on the first of the passages, one on the second: their answers, and the numbers of their passages.
ASKED = {
    "Who built the machine?": ("Ada Lovelace", 0),
    "When was it built?": ("1843", 0),
    "Where did Benz live?": ("Mannheim", 1),
}
ROWS = [
    {"id": question, "question": question, "answers": [answer], "gold": [gold],
     "passages": [{"title": title, "text": text} for title, text in PASSAGES]}
    for question, (answer, gold) in ASKED.items()
]  # fmt: skip


def _closed_rows(count: int) -> list[dict[str, Any]]:
    """Two closed questions on each of two contexts, which share all passages but one."""
    first = [{"title": f"Town {n}", "text": f"Town {n} has {900 + n} inhabitants."} for n in range(count)]
    second = [*first[:-1], {"title": "Town 6", "text": "Town 6 has 100 inhabitants."}]
    return [
        {"id": f"{question} {answer}", "question": question, "answers": [answer], "passages": passages, "closed": True,
         "gold": list(range(count))}
        for passages, largest, smallest in ((first, f"Town {count - 1}", "Town 0"), (second, "Town 4", "Town 6"))
        for question, answer in (("Who is largest?", largest), ("Who is smallest?", smallest))
    ]  # fmt: skip


def _contexts(
    model: RefragModel, folder: Path, rows: Sequence[dict[str, Any]], steps: int, renamed_share: float = 0.0
) -> Iterator[tuple[str, list[str]]]:
    """Each context of the first steps over these rows, as text, and what is asked about it, each with its answer."""
    file = folder / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = reading_task(model, folder, questions_share=1.0, renamed_share=renamed_share, questions=[str(file)])
    decode = model.tokenizer.decode
    for step in range(1, steps + 1):
        batch = batch_of(task, step)
        for chunks, blocks in zip(batch["chunks"], batch["blocks"].tolist(), strict=True):
            yield decode(chunks[chunks != PAD].tolist()), [decode(ids) for ids in blocks]


def test_contexts_of_questions_show_what_answers_them(model: RefragModel, tmp_path: Path) -> None:
    asked = set()
    for text, blocks in _contexts(model, tmp_path, ROWS, steps=11):
        for question, (answer, _) in ASKED.items():
            if stated := [block for block in blocks if question in block]:
                assert answer in text and all(answer in block for block in stated)
                asked.add(question)
        assert any(passage in text for _, passage in PASSAGES)
    assert asked == set(ASKED)


def test_what_is_cut_off_a_long_passage_is_not_asked_for(model: RefragModel, tmp_path: Path) -> None:
    said = " ".join(f"On day {day} nothing happened in the old workshop." for day in range(200))
    passages = [{"title": "Engines", "text": f"{said} The machine was built by Zuse."}]
    row = {"id": "q", "question": "Who built the machine?", "answers": ["Zuse"], "passages": passages, "gold": [0]}
    for text, blocks in _contexts(model, tmp_path, [row], steps=1):
        assert "On day 1 " in text and "Zuse" not in text
        assert not any("Zuse" in block or "Who built" in block for block in blocks)
        assert any("assistant" in block for block in blocks)


def test_a_question_that_lists_its_passage_alone_is_asked_among_those_of_its_neighbours(
    model: RefragModel, tmp_path: Path
) -> None:
    rows = [
        {"id": f"q{n}", "question": f"Who keeps number {n}?", "answers": [f"Keeper {n}"], "gold": [0],
         "passages": [{"title": "", "text": f"Keeper {n} keeps number {n}."}]}
        for n in range(40)
    ]  # fmt: skip
    spans = []
    for text, blocks in _contexts(model, tmp_path, rows, steps=8):
        shown = {int(number) for number in re.findall(r"Keeper (\d+)", text)}
        asked = {int(number) for block in blocks for number in re.findall(r"Who keeps number (\d+)", block)}
        assert asked and asked <= shown
        spans.append(max(shown) - min(shown))
    assert max(spans) > 1 and all(span <= 24 for span in spans)


def test_a_closed_question_is_asked_over_all_of_its_passages_as_they_are(model: RefragModel, tmp_path: Path) -> None:
    rows, seen = _closed_rows(6), set()
    for text, blocks in _contexts(model, tmp_path, rows, steps=9, renamed_share=1.0):
        shown = [row for row in rows if all(passage["text"] in text for passage in row["passages"])]
        assert len(shown) == 2 and text.count("inhabitants") == 6
        for row in shown:
            if stated := [block for block in blocks if row["question"] in block]:
                assert all(row["answers"][0] in block.split("assistant")[-1] for block in stated)
                seen.add(row["id"])
    assert seen == {row["id"] for row in rows}


def test_questions_whose_passages_do_not_fit_together_are_left_out_and_counted(
    model: RefragModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [{"title": str(n), "text": f"In {n} " + "nothing happened. " * 30} for n in range(3)]
    both = {"id": "x", "question": "Who?", "answers": ["Ada"], "passages": long, "gold": [0, 2]}
    next(_contexts(model, tmp_path, [*_closed_rows(3), both], steps=1))
    said = "cpt.reading: 1 of 5 questions left out: 1 whose passages take more than 256 tokens"
    assert said in capsys.readouterr().err


def test_renamed_contexts_ask_for_what_they_say_now(model: RefragModel, tmp_path: Path) -> None:
    answers = set()
    for text, blocks in _contexts(model, tmp_path, ROWS, steps=29, renamed_share=1.0):
        for block in blocks:
            if "When was it built?" in block:
                answer = re.findall(r"\d+", block)[-1]
                assert answer in text
                answers.add(answer)
    assert len(answers - {"1843"}) > 3


def test_questions_without_an_answer_or_a_passage_are_not_enough(model: RefragModel, tmp_path: Path) -> None:
    row = {"id": "q", "question": "Who?", "answers": ["Ada"], "passages": [{"title": "", "text": "Ada."}], "gold": []}
    with pytest.raises(RefragError, match="nothing to ask"):
        next(_contexts(model, tmp_path, [row], steps=1))
