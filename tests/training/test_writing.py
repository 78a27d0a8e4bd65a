"""Written questions: decoded together as each by itself, filtered, the same whenever they are made, fit to train on."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from refrag_platform.corpus.passage_rows import passage_rows
from refrag_platform.corpus.question import Passage, Question
from refrag_platform.corpus.question_files import read_questions
from refrag_platform.errors import RefragError
from refrag_platform.model.prompts import content_ids, contents_ids, end_of_turn, passage_text, question_frame
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.recipes import CptRecipe, ReadingRecipe, TrainsDecoder
from refrag_platform.training.core.loop import train
from refrag_platform.training.cpt import cpt_task
from refrag_platform.training.reading.blanks import QuestionAnswer
from refrag_platform.training.writing.asking import REPEATED
from refrag_platform.training.writing.continuations import Continuation, continuations
from refrag_platform.training.writing.filters import fault, repeated, unsure
from refrag_platform.training.writing.layout import PASSAGE_TOKENS, WriterLayout
from refrag_platform.training.writing.models import load_text_model, save_text_model
from refrag_platform.training.writing.parts import WritingSettings
from refrag_platform.training.writing.write import WritingInputs, begin
from refrag_platform.training.writing.writer import WriterExample, WriterTask, examples, train_writer
from refrag_platform.weights import load_decoder, load_tokenizer
from tests.command import refrag
from tests.conftest import copy_project
from tests.training.conftest import write_corpus

# Two sentences that every passage has, and what is asked about each.
ASKED = {
    "Ada built the house in London.": QuestionAnswer("Where was the house built?", "London"),
    "The clock in it is made of gold.": QuestionAnswer("What was the clock made of?", "gold"),
}
FAST: dict[str, Any] = {"batch_size": 8, "precision": "fp32", "decoder_learning_rate": 8e-3}
HELD_OUT = ("House 99", " ".join(ASKED))
SETTINGS = WritingSettings(per_passage=3, least_log_probability=-0.35, batch=2, seed=0)


def _passage(number: int) -> Passage:
    first, second = ASKED if number % 2 else reversed(ASKED)
    return f"House {number}", f"{first} {second}"


def _questions(numbers: range) -> list[Question]:
    return [
        Question(f"{number} {n}", one.question, (one.answer,), (_passage(number),), (0,))
        for number in numbers
        for n, one in enumerate(ASKED.values())
    ]


@pytest.fixture(scope="module")
def written_about(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose corpus has forty passages for training and a held-out one, with a writer and a reader."""
    project = copy_project(tmp_path_factory.mktemp("writing") / "project")
    base, recipe, folder = project.recipe_path("tiny").parent, project.recipe("tiny"), project.content("corpus", "tiny")
    rows = [(*_passage(number), "train") for number in range(40)] + [(*HELD_OUT, "test")]
    tokenizer = load_tokenizer(recipe.decoder, base)
    write_corpus(folder, [np.array(content_ids(tokenizer, " ".join(text for _, text, _ in rows)))])
    columns = zip(("title", "text", "split"), zip(*rows, strict=True), strict=True)
    parquet.write_table(pa.table({name: list(column) for name, column in columns}), folder / "passages.parquet")
    settings = TrainsDecoder(steps=60, **FAST)
    train_writer(recipe, base, _questions(range(8)), settings, 0, project.root / "training", project.root / "writer")
    _train_reader(project, settings)
    return project


def _train_reader(project: Project, settings: TrainsDecoder) -> None:
    recipe, base = project.recipe("tiny"), project.recipe_path("tiny").parent
    decoder, tokenizer = load_decoder(recipe.decoder, base, 1), load_tokenizer(recipe.decoder, base)
    opening, before, after = question_frame(tokenizer)
    learned = []
    for one in _questions(range(8)):
        passage, question, answer = contents_ids(
            tokenizer, [passage_text(*one.passages[0]), one.question, one.answers[0]]
        )
        prompt = [*opening, *passage, *before, *question, *after]
        learned.append(WriterExample(prompt, [*answer, end_of_turn(tokenizer)]))
    train(WriterTask(decoder, learned, settings, 0), settings, project.root / "reader-training", "reader")
    (project.root / "reader").mkdir()
    save_text_model(decoder, tokenizer, project.root / "reader")


def _rows(project: Project, settings: WritingSettings, count: int) -> list[Any]:
    inputs = WritingInputs([], [], True, project.root / "writer", project.root / "reader")
    with begin(project, "tiny", inputs, settings, 1, torch.device("cpu")) as writing:
        return writing.rows(count)


def _write(project: Project, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: object, status: int = 0) -> str:
    monkeypatch.setenv("REFRAG_ROOT", str(project.root))
    models = ("--writer", project.root / "writer", "--reader", project.root / "reader")
    command = ("questions", "write", "--model", "tiny", "--out", out, "--batch", 2, "--per-passage", 3)
    return refrag(*command, *models, *arguments, status=status).output


def _alone(model: RefragModel, token_ids: list[int], most: int, end_id: int) -> Continuation:
    """The likeliest tokens one by one, each after a forward pass over all before it."""
    tokens, scores = list(token_ids), []
    for _ in range(most):
        with torch.no_grad():
            logits = model.decoder(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        tokens.append(int(logits.argmax()))
        scores.append(float(logits.max()))
        if tokens[-1] == end_id:
            break
    made = tokens[len(token_ids) :]
    ended = made[-1] == end_id
    return Continuation(made[:-1] if ended else made, ended, sum(scores) / len(scores))


def test_what_shares_a_context_is_decoded_as_each_by_itself(model: RefragModel) -> None:
    chance = np.random.default_rng(0)

    def ids(size: int) -> list[int]:
        return chance.integers(3, len(model.tokenizer), size).tolist()

    contexts = [ids(size) for size in (11, 23, 17, 5)]
    prompts = [[ids(int(chance.integers(1, 9))) for _ in range(count)] for count in (4, 1, 0, 3)]
    pairs = [[[*context, *prompt] for prompt in own] for context, own in zip(contexts, prompts, strict=True)]
    unending = [_alone(model, pair, 12, -1).token_ids for own in pairs for pair in own]
    # A token that some of them come to, early and late, and others don't.
    end_id = Counter(token for own in unending for token in set(own[2:])).most_common(1)[0][0]
    alone = [[_alone(model, pair, 12, end_id) for pair in own] for own in pairs]
    together = continuations(model.decoder, contexts, prompts, 12, end_id)
    assert [[one[:2] for one in own] for own in together] == [[one[:2] for one in own] for own in alone]
    assert len({one.ended for own in alone for one in own}) == 2
    for one, other in zip(chain(*together), chain(*alone), strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


def test_a_decoder_that_reads_too_few_positions_is_refused(model: RefragModel) -> None:
    with pytest.raises(RefragError, match=r"reads 2,048 positions at most, .* takes up to 3,002"):
        continuations(model.decoder, [[5]], [[[6]]], 3000, 2)


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("Where was the house built?", "London", None),
        ("Where was the house built?", "Paris", "answer not in the passage"),
        ("Where was the house built?", "Lond", "answer not in the passage"),
        ("Was it in london that it was built?", "London", "answer in the question"),
        ("Where?", "London", "question too short"),
    ],
)
def test_a_question_is_dropped_with_its_reason(question: str, answer: str, reason: str | None) -> None:
    assert fault(QuestionAnswer(question, answer), ("House", "It was built in London.")) == reason


def test_a_question_counts_as_repeated_whatever_its_case() -> None:
    assert repeated(QuestionAnswer("where WAS it  built?", "London"), ["Who built it?", "Where was it built?"])
    assert not repeated(QuestionAnswer("Where was it?", "London"), ["Who built it?", "Where was it built?"])


def test_a_reader_is_sure_by_its_probability_or_by_agreeing() -> None:
    assert unsure("London", -0.5, "Paris", -0.35)
    assert not unsure("London", -0.3, "Paris", -0.35)
    assert not unsure("london", -2.0, "London", -0.35)


def test_what_is_written_is_read_back_and_a_long_passage_is_shown_in_part(model: RefragModel) -> None:
    layout, asked = WriterLayout(model.tokenizer), QuestionAnswer("Where was it built?", "in London, by 1843")
    assert layout.read(layout.written(asked)[:-1]) == asked
    assert layout.read(content_ids(model.tokenizer, " London")) is None
    long = " ".join(f"In the year {year} a house was built." for year in range(1000, 1200))
    short, cut = layout.shown([_passage(1), ("Houses", long)])
    assert short.passage == _passage(1) and short.sentences == list(ASKED)
    title, text = cut.passage
    assert title == "Houses" and long.startswith(text) and len(text) < len(long)
    assert len(cut.token_ids) == 1 + PASSAGE_TOKENS


def test_a_writer_learns_from_the_sentence_that_answers(model: RefragModel, capsys: pytest.CaptureFixture[str]) -> None:
    layout, (first, second) = WriterLayout(model.tokenizer), _questions(range(1))
    unlabelled = Question("q", "Who?", ("Nobody",), (_passage(0),), (0,))
    learned = examples([first, second, unlabelled], layout)
    for one, sentence in zip(learned, ASKED, strict=True):
        assert model.tokenizer.decode(one.prompt).endswith(f"\nSentence: {sentence}\nAnswer:")
    assert "1 of 3 questions left out" in capsys.readouterr().err
    with pytest.raises(RefragError, match="no question to learn writing from"):
        examples([unlabelled], layout)


def test_questions_are_written_counted_and_fit_to_train_on(
    written_about: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: RefragModel
) -> None:
    out = tmp_path / "written.jsonl"
    _write(written_about, monkeypatch, out, "--count", 20)
    questions = read_questions(out)
    assert len(questions) == 20 and len({one.id for one in questions}) == 20
    train = {_passage(number) for number in range(40)}
    for one in questions:
        assert set(one.passages) <= train and one.gold == (0,)
        assert fault(QuestionAnswer(one.question, one.answers[0]), one.passages[0]) is None
    # What chance draws isn't always what was learned.
    assert sum(QuestionAnswer(one.question, one.answers[0]) in ASKED.values() for one in questions) > 10
    manifest = json.loads((tmp_path / "written.jsonl.manifest.json").read_text())
    counts, dropped = manifest["counts"], manifest["dropped"]
    assert counts["written"] == counts["kept"] + sum(dropped.values()) and dropped[REPEATED] > 0
    assert manifest["questions"] == 20 and manifest["reader"]["hash"] != manifest["writer"]["hash"]
    settings = CptRecipe(
        steps=2, batch_size=2, precision="fp32", context_tokens=256, output_tokens=16, curriculum=None,
        reading=ReadingRecipe(
            blocks=4, block_tokens=96, steps_share=0.99, questions=[str(out)], questions_share=1.0, renamed_share=0.0
        ),
    )  # fmt: skip
    task = cpt_task(model, written_about.content("corpus", "tiny"), settings, 0, "refrag")
    blocks = task.batch(1, 0, 2, 0, 1)["blocks"].flatten(0, 1)
    asked = [model.tokenizer.decode(block) for block in blocks]
    assert any(one.question in text for text in asked for one in ASKED.values())
    assert "is there already" in _write(written_about, monkeypatch, out, status=2)


def test_writing_that_was_stopped_goes_on_to_the_same_file(written_about: Project) -> None:
    whole = _rows(written_about, SETTINGS, 1000)
    (parts,) = (written_about.work_dir("questions", "tiny")).glob("parts-*")
    made = {file.name: file.read_bytes() for file in parts.iterdir()}
    assert len(made) > 2 and len(whole) > 40
    for file in list(parts.iterdir()):
        if file.name != "part-000000.json":
            file.unlink()
    (parts / ".part-000001.json.partial").write_text("{")
    first = (parts / "part-000000.json").stat().st_ino
    assert _rows(written_about, SETTINGS, 1000) == whole
    assert (parts / "part-000000.json").stat().st_ino == first
    assert {file.name: file.read_bytes() for file in parts.iterdir()} == made


def test_rows_stand_in_the_order_of_their_passages(written_about: Project) -> None:
    corpus = written_about.content("corpus", "tiny")
    in_order = [(title, text) for title, text, split in passage_rows(corpus) if split == "train"]
    rows = _rows(written_about, SETTINGS, 40)
    places = [in_order.index(tuple(row["passages"][0].values())) for row in rows]
    assert places == sorted(places) and len(set(places)) > 5
    assert [row["id"] for row in rows] == [f"written-{number}" for number in range(1, len(rows) + 1)]


def test_the_seed_decides_what_is_written(written_about: Project, tmp_path: Path) -> None:
    def rows(seed: int) -> list[Any]:
        return _rows(written_about, WritingSettings(3, -0.35, 4, seed), 12)

    first = rows(3)
    for parts in written_about.work_dir("questions", "tiny").glob("parts-*"):
        parts.rename(tmp_path / parts.name)
    assert rows(3) == first and rows(4) != first


def test_held_out_passages_are_not_written_about(
    written_about: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "passages.jsonl"
    file.write_text(
        "".join(json.dumps(dict(zip(("title", "text"), one, strict=True))) + "\n" for one in (HELD_OUT, _passage(50)))
    )
    arguments = ("--passages", file, "--no-corpus-passages", "--count", 3)
    said = _write(written_about, monkeypatch, tmp_path / "out.jsonl", *arguments)
    assert "questions write: 1 of 2 passages left out: 1 held out by the corpus" in said
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["passages"][0]["title"] for row in rows} == {"House 50"}


def test_a_writer_is_trained_once_and_without_a_sure_reader_nothing_is_written(
    written_about: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled, writer = tmp_path / "labelled.jsonl", tmp_path / "writer"
    rows = [
        {"question": one.question, "answers": one.answers, "gold": [0],
         "passages": [{"title": title, "text": text} for title, text in one.passages]}
        for one in _questions(range(2))
    ]  # fmt: skip
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--questions", str(labelled), "--writer", str(writer), "--steps", "2", "--count", "3")
    for _ in range(2):
        said = _write(written_about, monkeypatch, tmp_path / "out.jsonl", *arguments, status=2)
        assert "of 120 questions was kept (" in said
        assert not (tmp_path / "out.jsonl").exists()
        # The second call finds the writer: it needs no questions.
        arguments = ("--writer", str(writer))
    assert load_text_model(writer).decoder.config.vocab_size
