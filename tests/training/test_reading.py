"""Reading tasks: what is asked, how it is laid out, and that a packed batch is read as each question by itself."""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refrag_platform.corpus.passages import sentences
from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.model.prompts import content_ids, question_frame, rag_prompt
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import PAD, Chunks, Text, plain_tokens
from refrag_platform.recipes import CptRecipe, ReadingRecipe, System
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.core.loop import train
from refrag_platform.training.cpt import CptTask, cpt_task
from refrag_platform.training.kept import step_rate
from refrag_platform.training.reading.blanks import ASKED_BY, GAP, blank
from refrag_platform.training.reading.renaming import Renaming
from tests.training.conftest import write_corpus

NAMES = ("Ada Lovelace", "Karl Benz", "Mary Anning", "Ibn Sina", "Nikola Tesla", "Grace Hopper")
PASSAGES = (
    ("Engines", "The first machine was built by Ada Lovelace in 1843. It stood in London for a while."),
    ("Motors", "In those days Karl Benz lived in Mannheim with his wife Bertha."),
    ("Fossils", "Near Lyme Regis the bones were found by Mary Anning in 1811."),
)
PLACES = ("London", "Mannheim", "Lyme Regis", "Hamadan", "Smiljan", "New York")


def _text(number: int) -> str:
    chance = np.random.default_rng(number)
    lines = []
    for year in range(1800, 1812):
        name, place = NAMES[chance.integers(6)], PLACES[chance.integers(6)]
        lines.append(f"In the year {year + number} the engineer {name} built a large machine near {place}.")
    return " ".join(lines)


def _task(model: RefragModel, folder: Path, system: System = "refrag", workers: int = 0, **reading: Any) -> CptTask:
    documents = [np.array(content_ids(model.tokenizer, _text(number))) for number in range(6)]
    settings = CptRecipe(
        steps=6, batch_size=2, precision="fp32", context_tokens=256, output_tokens=16, curriculum=None, workers=workers,
        reading=ReadingRecipe(**{"blocks": 4, "block_tokens": 96, "steps_share": 0.99} | reading),
    )  # fmt: skip
    return cpt_task(model, write_corpus(folder / "corpus", documents), settings, 0, system)


def _file(folder: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """A file of questions, as a recipe names it."""
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / "asked.jsonl")]


def _questions(folder: Path) -> list[str]:
    """Two questions on the first of three passages, one on the second."""
    passages = [{"title": title, "text": text} for title, text in PASSAGES]
    asked = [
        ("Who built the machine?", "Ada Lovelace", 0),
        ("When was it built?", "1843", 0),
        ("Where did Benz live?", "Mannheim", 1),
    ]
    rows = [
        {"id": f"q{n}", "question": question, "answers": [answer], "passages": passages, "gold": [gold]}
        for n, (question, answer, gold) in enumerate(asked)
    ]
    return _file(folder, rows)


def _batch(task: CptTask, step: int = 1) -> Batch:
    batch = task.batch(step, 0, 2, 0, 1)
    assert "blocks" in batch
    return batch


def _context(model: RefragModel, batch: Batch, row: int) -> str:
    """The passages of a row as text."""
    chunks = batch["chunks"][row]
    return str(model.tokenizer.decode(chunks[chunks != PAD].tolist()))


def test_a_blank_asks_for_something_that_a_sentence_says() -> None:
    text = _text(1)
    answers = set()
    for seed in range(200):
        if (asked := blank(text, np.random.default_rng(seed))) is None:
            continue
        said = [one for one in sentences(text) if asked.answer in one]
        words = set(re.findall(r"\w+", asked.question.replace(GAP, "").lower()))
        words -= set(" ".join(word for way in ASKED_BY.values() for word in way).split())
        assert any(words <= set(re.findall(r"\w+", one.lower())) for one in said), asked
        assert asked.question.endswith("?") or GAP in asked.question
        answers.add(asked.answer)
    assert answers & set(NAMES) and answers & set(PLACES) and any(one.isdigit() for one in answers)


def test_a_capital_at_a_sentences_start_is_no_name() -> None:
    drawn = [
        blank("When Benz came home the lamps of the street were lit.", np.random.default_rng(n)) for n in range(60)
    ]
    assert {one.answer for one in drawn if one} >= {"Benz"}
    assert not any(one.answer.startswith("When") for one in drawn if one)


def test_contexts_hold_passages_of_the_corpus_that_fit(model: RefragModel, tmp_path: Path) -> None:
    task = _task(model, tmp_path)
    corpus = " ".join(_text(number) for number in range(6))
    first, again = _batch(task), _batch(task)
    assert torch.equal(first["chunks"], again["chunks"]) and not torch.equal(first["chunks"], _batch(task, 2)["chunks"])
    for chunks, windows in zip(first["chunks"], first["windows"], strict=True):
        assert torch.equal(windows >= 0, (chunks != PAD).any(1))
        for number in range(int(windows.max()) + 1):
            ids = chunks[windows == number]
            # Only a passage's last chunk is not full.
            assert (ids[:-1] != PAD).all()
        text = model.tokenizer.decode(chunks[chunks != PAD].tolist())
        for sentence in sentences(text):
            assert sentence in corpus


def test_a_question_stands_in_the_format_of_serving(model: RefragModel) -> None:
    opening, before, after = question_frame(model.tokenizer)
    asked = content_ids(model.tokenizer, "Who built it?")
    assert [*opening, *before, *asked, *after] == plain_tokens(rag_prompt(model.tokenizer, "Who built it?", []))


@pytest.mark.parametrize(
    ("system", "rate"),
    [("refrag", 1), ("refrag", 2), ("full", 1), ("full", 2), ("none", 1), ("truncated", 1), ("plain", 1)],
)
def test_a_packed_batch_is_read_as_each_question_by_itself(
    model: RefragModel, tmp_path: Path, system: System, rate: int
) -> None:
    model.rates = (1, rate)
    task = _task(model, tmp_path, system, kept_steps_share=1.0)
    batch = _batch(task, next(step for step in range(1, 40) if step_rate(model.rates, 0, step) == rate))
    loss, figures = task(batch)
    judged, summed = 0, 0.0
    for row in range(2):
        chunks, keep = batch["chunks"][row], batch["keep"][row]
        windows = batch["windows"][row].view(-1, rate)[:, 0]
        real = windows >= 0
        passages = [
            Chunks(chunks[part], keep[part]) for number in range(int(windows.max()) + 1)
            if (part := windows == number).any()
        ]  # fmt: skip
        if system == "none":
            passages = []
        elif system == "refrag":
            assert 0 < int(keep.sum()) < int(real.sum())
        else:
            assert torch.equal(keep, real), "what is asked would not stand in a part"
        opening, *_ = question_frame(model.tokenizer)
        for number in range(4):
            ids = batch["blocks"][row, number].tolist()
            first = (row * 4 + number) * 96
            places = [int(p) - first for p in batch["answers"].tolist() if first <= p < first + 96]
            if not places:
                continue
            prompt = [Text(opening), *passages, Text(ids[: places[-1] + 1])]
            logits = model.at_rate(rate)([prompt])[0].detach().log_softmax(-1)
            for place in places:
                summed -= float(logits[len(logits) - 1 - (places[-1] - place) - 1, ids[place]])
                judged += 1
    assert judged
    assert float(figures["answers_loss"]) == pytest.approx(summed / judged, abs=2e-4)
    assert loss.requires_grad


def test_every_block_ends_with_its_answer(model: RefragModel, tmp_path: Path) -> None:
    batch = _batch(_task(model, tmp_path, quotes_share=0.5))
    text = " ".join(_text(number) for number in range(6))
    ids = batch["blocks"].flatten()
    answers = model.tokenizer.decode(ids[batch["answers"]].tolist())
    quotes = model.tokenizer.decode(ids[batch["quotes"]].tolist())
    assert answers and quotes
    assert quotes.strip()[:8] in text
    assert set(batch["answers"].tolist()).isdisjoint(batch["quotes"].tolist())


def test_batches_made_by_workers_are_the_same_and_training_ends(tmp_path: Path, model: RefragModel) -> None:
    summaries = []
    for workers in (0, 2):
        torch.manual_seed(0)
        task = _task(copy.deepcopy(model), tmp_path / str(workers), workers=workers)
        summaries.append(train(task, task.settings, tmp_path / f"work{workers}", "cpt"))
    assert summaries[0]["steps"] == 6
    assert summaries[0]["loss_after"] == pytest.approx(summaries[1]["loss_after"], rel=1e-5)
    assert {"answers_loss", "vector_std"} <= set(summaries[0]["last"])


def test_contexts_of_questions_show_what_answers_them(model: RefragModel, tmp_path: Path) -> None:
    task = _task(model, tmp_path, questions_share=1.0, renamed_share=0.0, questions=_questions(tmp_path))
    answers, asked = {"Who built the machine?": "Ada Lovelace", "Where did Benz live?": "Mannheim"}, set()
    for step in range(1, 12):
        batch = _batch(task, step)
        for row in range(2):
            text = _context(model, batch, row)
            for ids in batch["blocks"][row].tolist():
                block = model.tokenizer.decode(ids)
                for question, answer in answers.items():
                    if question in block:
                        assert answer in text and answer in block
                        asked.add(question)
            assert any(passage in text for _, passage in PASSAGES)
    assert len(asked) == 2


def test_what_is_cut_off_a_long_passage_is_not_asked_for(model: RefragModel, tmp_path: Path) -> None:
    said = " ".join(f"On day {day} nothing happened in the old workshop." for day in range(200))
    passages = [{"title": "Engines", "text": f"{said} The machine was built by Zuse."}]
    row = {"id": "q", "question": "Who built the machine?", "answers": ["Zuse"], "passages": passages, "gold": [0]}
    task = _task(model, tmp_path, questions_share=1.0, renamed_share=0.0, questions=_file(tmp_path, [row]))
    batch = _batch(task)
    text = _context(model, batch, 0)
    blocks = model.tokenizer.decode(batch["blocks"].flatten().tolist())
    assert "On day 1 " in text and "Zuse" not in text
    assert "Zuse" not in blocks and "Who built" not in blocks and len(batch["answers"]) > 0


def test_a_question_that_lists_its_passage_alone_is_asked_among_those_of_its_neighbours(
    model: RefragModel, tmp_path: Path
) -> None:
    rows = [
        {"id": f"q{n}", "question": f"Who keeps number {n}?", "answers": [f"Keeper {n}"], "gold": [0],
         "passages": [{"title": "", "text": f"Keeper {n} keeps number {n}."}]}
        for n in range(40)
    ]  # fmt: skip
    task = _task(model, tmp_path, questions_share=1.0, renamed_share=0.0, questions=_file(tmp_path, rows))
    spans = []
    for step in range(1, 9):
        batch = _batch(task, step)
        for row in range(2):
            text = _context(model, batch, row)
            shown = {int(number) for number in re.findall(r"Keeper (\d+)", text)}
            asked = {int(n) for ids in batch["blocks"][row].tolist()
                     for n in re.findall(r"Who keeps number (\d+)", model.tokenizer.decode(ids))}  # fmt: skip
            assert asked and asked <= shown
            spans.append(max(shown) - min(shown))
    assert max(spans) > 1 and all(span <= 24 for span in spans)


def _closed_rows(count: int) -> list[dict[str, Any]]:
    """Two closed questions on each of two contexts, which share all passages but one."""
    towns = [
        {"title": f"Town {number}", "text": f"Town {number} has {900 + number} inhabitants."} for number in range(7)
    ]
    first, second = towns[:count], [*towns[: count - 1], {"title": "Town 6", "text": "Town 6 has 100 inhabitants."}]
    contexts = (("a", first, f"Town {count - 1}", "Town 0"), ("b", second, "Town 4", "Town 6"))
    return [
        {"id": f"{name}/{kind}", "question": question, "answers": [answer], "passages": passages, "closed": True,
         "gold": list(range(count)), "kind": kind}
        for name, passages, most, least in contexts
        for kind, question, answer in (("most", "Who is largest?", most), ("least", "Who is smallest?", least))
    ]  # fmt: skip


def test_a_closed_question_is_asked_over_all_of_its_passages_as_they_are(model: RefragModel, tmp_path: Path) -> None:
    rows = _closed_rows(6)
    task = _task(model, tmp_path, questions_share=1.0, renamed_share=1.0, questions=_file(tmp_path, rows))
    seen = set()
    for step in range(1, 10):
        batch = _batch(task, step)
        for row in range(2):
            text = _context(model, batch, row)
            (name,) = {one["id"][0] for one in rows if all(passage["text"] in text for passage in one["passages"])}
            assert text.count("inhabitants") == 6
            blocks = [model.tokenizer.decode(ids) for ids in batch["blocks"][row].tolist()]
            for one in rows:
                if asked := [block for block in blocks if one["question"] in block]:
                    own = next(other for other in rows if other["id"] == f"{name}/{one['kind']}")
                    assert all(own["answers"][0] in block.split("assistant")[-1] for block in asked)
                    seen.add(own["id"])
    assert seen == {row["id"] for row in rows}


def test_questions_whose_passages_do_not_fit_together_are_left_out_and_counted(
    model: RefragModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [{"title": str(n), "text": f"In {n} " + "nothing happened. " * 30} for n in range(3)]
    both = {"id": "x", "question": "Who?", "answers": ["Ada"], "passages": long, "gold": [0, 2]}
    _task(model, tmp_path, questions_share=1.0, questions=_file(tmp_path, [*_closed_rows(3), both]))
    assert (
        "cpt.reading: 1 of 5 questions left out: 1 whose passages take more than 256 tokens" in capsys.readouterr().err
    )


def test_ranks_share_a_batch(model: RefragModel, tmp_path: Path) -> None:
    task = _task(model, tmp_path)
    whole, halves = task.batch(1, 0, 2, 0, 1), [task.batch(1, 0, 2, rank, 2) for rank in range(2)]
    for name in ("chunks", "windows", "keep", "blocks"):
        assert torch.equal(whole[name], torch.cat([half[name] for half in halves])), name


def test_renamed_contexts_ask_for_what_they_say_now(model: RefragModel, tmp_path: Path) -> None:
    task = _task(model, tmp_path, questions_share=1.0, renamed_share=1.0, questions=_questions(tmp_path))
    answers = set()
    for step in range(1, 30):
        batch = _batch(task, step)
        for row in range(2):
            text = _context(model, batch, row)
            for ids in batch["blocks"][row].tolist():
                block = model.tokenizer.decode(ids)
                if "When was it built?" in block:
                    answer = re.findall(r"\d+", block)[-1]
                    assert answer in text
                    answers.add(answer)
    assert len(answers - {"1843"}) > 3


def test_names_are_replaced_everywhere_alike_and_other_words_stay() -> None:
    renaming = Renaming(["Otto", "Wanda"])
    text = "Then Karl Benz drove to Mannheim in 1888. Benz was 44."
    changed = {renaming.draw([text], np.random.default_rng(seed))(text) for seed in range(40)}
    assert len(changed) > 10
    for one in changed:
        found = re.fullmatch(r"Then (\w+) (\w+) drove to (\w+) in ([1-9]\d{3})\. (\w+) was ([1-9]\d)\.", one)
        assert found and found[2] == found[5]
        assert {found[1], found[2], found[3]} <= {"Karl", "Benz", "Mannheim", "Otto", "Wanda"}
    assert Renaming([]).draw(["Karl"], np.random.default_rng(0))("Karl") == "Karl"


def test_questions_without_an_answer_or_a_passage_are_not_enough(model: RefragModel, tmp_path: Path) -> None:
    row = {"id": "q", "question": "Who?", "answers": ["Ada"], "passages": [{"title": "", "text": "Ada."}], "gold": []}
    with pytest.raises(RefragError, match="nothing to ask"):
        _task(model, tmp_path, questions_share=0.5, questions=_file(tmp_path, [row]))


def test_a_corpus_without_sentences_and_blocks_without_room_are_refused(model: RefragModel, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"block_tokens is 20"):
        _task(model, tmp_path, block_tokens=20)
    settings = _task(model, tmp_path / "other").settings
    numbers = write_corpus(tmp_path / "numbers", [np.array(content_ids(model.tokenizer, "7 " * 900))])
    with pytest.raises(RefragError, match="no sentences to ask about"):
        cpt_task(model, numbers, settings, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"curriculum": {}}, "curriculum: null"),
        ({"repeat_steps_share": 0.1, "curriculum": None}, "repeat_steps_share"),
        ({"curriculum": None, "reading": {"quotes_share": 0, "quotes_weight": 1}}, "quotes_weight"),
        ({"curriculum": None, "reading": {"renamed_share": 1.0}}, "renamed_share"),
        ({"curriculum": None, "reading": {"kept_steps_share": 0, "most_share_kept": 0.5}}, "most_share_kept"),
    ],
)
def test_reading_keys_that_disagree_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CptRecipe(**{"steps": 4, "reading": {}} | keys)
