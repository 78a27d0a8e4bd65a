"""Reading tasks: what is asked, how it is laid out, and that a packed batch is read as each question by itself."""

import copy
import re
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
from refrag_platform.recipes import CptRecipe, TrainedSystem
from refrag_platform.training.core.loop import train
from refrag_platform.training.cpt import cpt_task
from refrag_platform.training.kept import step_rate
from refrag_platform.training.reading.blanks import ASKED_BY, GAP, blank
from refrag_platform.training.reading.renaming import Renaming
from tests.training.conftest import write_corpus
from tests.training.reading import NAMES, PLACES, TEXTS, batch_of, reading_task


def test_a_blank_asks_for_something_that_a_sentence_says() -> None:
    text = TEXTS[1]
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
    task = reading_task(model, tmp_path)
    corpus = " ".join(TEXTS)
    first, again, second = batch_of(task), batch_of(task), batch_of(task, 2)
    assert torch.equal(first["chunks"], again["chunks"]) and not torch.equal(first["chunks"], second["chunks"])
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
    model: RefragModel, tmp_path: Path, system: TrainedSystem, rate: int
) -> None:
    model.rates = (1, rate)
    task = reading_task(model, tmp_path, system, kept_steps_share=1.0)
    batch = batch_of(task, next(step for step in range(1, 40) if step_rate(model.rates, 0, step) == rate))
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
    batch = batch_of(reading_task(model, tmp_path, quotes_share=0.5))
    text = " ".join(TEXTS)
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
        task = reading_task(copy.deepcopy(model), tmp_path / str(workers), workers=workers)
        summaries.append(train(task, task.settings, tmp_path / f"work{workers}", "cpt"))
    assert summaries[0]["steps"] == 6
    assert summaries[0]["loss_after"] == pytest.approx(summaries[1]["loss_after"], rel=1e-5)
    assert {"answers_loss", "vector_std"} <= set(summaries[0]["last"])


def test_ranks_share_a_batch(model: RefragModel, tmp_path: Path) -> None:
    task = reading_task(model, tmp_path)
    whole, halves = task.batch(1, 0, 2, 0, 1), [task.batch(1, 0, 2, rank, 2) for rank in range(2)]
    for name in ("chunks", "windows", "keep", "blocks"):
        assert torch.equal(whole[name], torch.cat([half[name] for half in halves])), name


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


def test_a_corpus_without_sentences_and_blocks_without_room_are_refused(model: RefragModel, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"block_tokens is 20"):
        reading_task(model, tmp_path, block_tokens=20)
    settings = reading_task(model, tmp_path / "other").settings
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
