"""Too little to learn from, too much for the decoder, nothing to see: refused or left out and counted, beforehand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refrag_platform.corpus.question import Question
from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import unchunk
from refrag_platform.recipes import FinetunedRecipe, PolicyRecipe, Recipe
from refrag_platform.training.cpt import cpt_task
from refrag_platform.training.episodes import QuestionEpisodes
from refrag_platform.training.examples import Examples
from refrag_platform.training.finetuned import FinetunedTask, text_windows
from refrag_platform.training.policy import policy_task
from refrag_platform.training.reconstruction import reconstruction_task
from tests.training.conftest import repeating_documents, write_corpus

GOLD = [{"title": "", "text": "The capital of Oman is Muscat."}]
LONG = "muscat " * 6000
# The tiny model reads 2,048 positions.
TOO_LONG = r"longer than the decoder's 2,048 positions"


def row(number: int, **changed: Any) -> dict[str, Any]:
    wanted = {"id": str(number), "question": f"What is {number}?", "answers": [f"answer {number}"]}
    return wanted | {"passages": [{"title": "", "text": f"It is answer {number}."}], "gold": [0]} | changed


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    (folder / "questions").mkdir(parents=True)
    text = "".join(json.dumps(one) + "\n" for one in rows)
    (folder / "questions" / "train.jsonl").write_text(text)
    return folder


def rag(recipe: Recipe, **changed: Any) -> FinetunedRecipe:
    return recipe.finetuned.model_copy(update={"tasks": {"rag": 1.0}, "max_passages": 3, "precision": "fp32"} | changed)


def asked_policy(recipe: Recipe, **changed: Any) -> PolicyRecipe:
    return recipe.policy.model_copy(update={"question_share": 1.0, "query": "question", "passages": 3} | changed)


def small(folder: Path, tokens: int) -> Path:
    return write_corpus(folder, [np.arange(tokens) % 200])


def test_fewer_windows_than_a_batch_are_refused_with_both_counts(
    model: RefragModel, recipe: Recipe, tmp_path: Path
) -> None:
    cpt = recipe.cpt.model_copy(update={"curriculum": None})
    with pytest.raises(RefragError, match=r"has 2 windows of 96 tokens, fewer than cpt\.batch_size \(8\)"):
        cpt_task(model, small(tmp_path / "cpt", 97), cpt, 0)
    with pytest.raises(RefragError, match=r"windows of 32 tokens, fewer than reconstruction\.batch_size \(16\)"):
        reconstruction_task(model, small(tmp_path / "reconstruction", 40), recipe.reconstruction, 0)
    with pytest.raises(RefragError, match=r"fewer than policy\.batch_size \(4\)"):
        policy_task(model, small(tmp_path / "policy", 97), recipe.policy, 0)
    text = rag(recipe, text_share=0.5, context_tokens=64, output_tokens=32)
    with pytest.raises(RefragError, match=r"fewer than finetuned\.batch_size \(4\)"):
        text_windows(small(tmp_path / "finetuned", 97), text, model, 0)
    assert cpt_task(model, small(tmp_path / "enough", 103), cpt, 0).batch(0, 0, 8, 0, 1)["output"].shape == (8, 32)


def test_sequences_over_the_decoders_positions_are_refused_with_the_keys(
    model: RefragModel, recipe: Recipe, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus", repeating_documents(64, 64, 2, range(10, 200)))
    long = {"context_tokens": 2048, "output_tokens": 1600, "curriculum": None}
    with pytest.raises(RecipeError, match=r"2,265 positions .* reads 2,048 .*cpt\.context_tokens \(2048\)"):
        cpt_task(model, corpus, recipe.cpt.model_copy(update=long), 0)
    with pytest.raises(RecipeError, match=r"3,648 positions"):
        cpt_task(model, corpus, recipe.cpt.model_copy(update=long), 0, system="full")
    curriculum = recipe.reconstruction.curriculum.model_copy(update={"max_factor": 256})
    model.decoder.config.max_position_embeddings = 1024
    with pytest.raises(RecipeError, match=r"1,281 positions .*reconstruction\.curriculum\.max_factor \(256\)"):
        reconstruction_task(model, corpus, recipe.reconstruction.model_copy(update={"curriculum": curriculum}), 0)
    long = {"context_tokens": 2048, "output_tokens": 500}
    with pytest.raises(RecipeError, match=r"policy\.context_tokens or policy\.output_tokens"):
        policy_task(model, corpus, recipe.policy.model_copy(update=long), 0)


def test_a_context_that_is_not_whole_chunks_is_refused(model: RefragModel, recipe: Recipe, tmp_path: Path) -> None:
    corpus = small(tmp_path / "corpus", 500)
    said, odd = r"context_tokens is 66; make it a multiple of encoder\.chunk_size \(4\)", {"context_tokens": 66}
    with pytest.raises(RecipeError, match=r"cpt\." + said):
        cpt_task(model, corpus, recipe.cpt.model_copy(update=odd), 0)
    with pytest.raises(RecipeError, match=r"policy\." + said):
        policy_task(model, corpus, recipe.policy.model_copy(update=odd), 0)
    with pytest.raises(RecipeError, match=r"finetuned\." + said):
        text_windows(corpus, rag(recipe, text_share=0.5, **odd), model, 0)


UNUSABLE = [
    ({"passages": [], "gold": []}, "without passages"),
    ({"answers": [LONG]}, TOO_LONG),
    ({"passages": [{"title": "", "text": LONG}]}, TOO_LONG),
    ({"question": LONG}, TOO_LONG),
]


@pytest.mark.parametrize(("changed", "reason"), UNUSABLE)
def test_what_cannot_be_learned_is_left_out_and_counted(
    model: RefragModel,
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any],
    reason: str,
) -> None:
    corpus = write(tmp_path / "some", [row(0), row(1), row(2, **changed)])
    settings = rag(recipe, no_answer_share=0.0)
    examples = Examples(corpus, settings, 0)
    task = FinetunedTask(model, settings, examples)
    said = capsys.readouterr().err
    assert "finetuned: 1 of 3 questions and summaries left out: 1 " + reason.replace("\\", "") in said
    answers = {examples.draw(step, one).answer for step in range(8) for one in range(4)}
    assert answers == {"answer 0", "answer 1"}
    assert all(task.batch(step, 0, 4, 0, 1)["token_ids"].shape[1] <= 2048 for step in range(8))
    policy_task(model, corpus, asked_policy(recipe), 0, tmp_path)
    assert "policy: 1 of 3 questions left out: 1 " in capsys.readouterr().err

    nothing = write(tmp_path / "nothing", [row(2, **changed)])
    with pytest.raises(RefragError, match=rf"nothing to learn from .left out: 1 {reason}.*finetuned\.questions"):
        FinetunedTask(model, settings, Examples(nothing, settings, 0))
    with pytest.raises(RefragError, match=rf"to learn the choice of chunks from .1 {reason}.*policy\.questions"):
        policy_task(model, nothing, asked_policy(recipe), 0, tmp_path)


def test_a_question_without_answer_and_passages_is_answered_by_saying_so(recipe: Recipe, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", [row(0), row(1, answers=[], passages=[], gold=[])])
    examples = Examples(corpus, rag(recipe, no_answer_share=0.0), 0)
    drawn = [examples.draw(step, 0) for step in range(16)]
    assert {one.question for one in drawn} == {"What is 0?", "What is 1?"}


def test_long_passages_do_not_push_a_prompt_over_the_decoders_positions(
    model: RefragModel, recipe: Recipe, tmp_path: Path
) -> None:
    # Each of some 1,500 positions: never two of them in one prompt.
    rows = [row(n, passages=[{"title": "", "text": f"answer {n} " + "muscat " * 1000}]) for n in range(4)]
    rows += [row(n) for n in range(4, 8)]
    corpus, settings = write(tmp_path / "corpus", rows), rag(recipe, max_passages=8)
    task = FinetunedTask(model, settings, Examples(corpus, settings, 0))
    lengths = [task.batch(step, 0, 4, 0, 1)["token_ids"].shape[1] for step in range(16)]
    assert 1000 < max(lengths) <= 2048
    passages = [(one["passages"][0]["title"], one["passages"][0]["text"]) for one in rows]
    asked = [Question(str(n), f"What is {n}?", (f"answer {n}",), (own,), (0,)) for n, own in enumerate(passages)]
    episodes = QuestionEpisodes(model.tokenizer, asked, 8, 4, 0, share_kept=0.0, positions=2048)
    drawn = [one for step in range(8) for one in episodes.draw(step, range(4))]
    sizes = [len(one.before) + len(one.chunks) + len(one.after) + len(one.output) for one in drawn]
    assert 1000 < max(sizes) <= 2048 and all(unchunk(one.chunks) for one in drawn)


def test_a_budget_that_leaves_nothing_to_choose_is_refused(model: RefragModel, recipe: Recipe, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", [row(n, passages=GOLD) for n in range(4)])
    with pytest.raises(RecipeError, match=r"policy\.share_kept is 0\.001: of the \d+ to \d+ chunks.*nothing to choose"):
        policy_task(model, corpus, asked_policy(recipe, share_kept=0.001), 0, tmp_path)


def test_documents_over_the_decoders_positions_are_left_out(model: RefragModel, recipe: Recipe, tmp_path: Path) -> None:
    corpus, file = write(tmp_path / "corpus", [row(0)]), tmp_path / "summaries.jsonl"
    rows = [{"id": "a", "document": "One. Two.", "summaries": ["Both."]},
            {"id": "b", "document": LONG, "summaries": ["Long."]}]  # fmt: skip
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    settings = rag(recipe, tasks={"summarization": 1.0}, summaries=[str(file)])
    examples = Examples(corpus, settings, 0)
    FinetunedTask(model, settings, examples)
    assert {examples.draw(step, 0).answer for step in range(16)} == {"Both."}
    assert examples.left_out.reasons.total() == 1


def test_a_held_out_page_is_found_nowhere_in_training(
    model: RefragModel, recipe: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    corpus = write(tmp_path / "corpus", [row(0), row(1)])
    pages = [
        {"title": "Oman", "text": "A planted page.", "split": "test"},
        {"title": "Peru", "text": "A page to learn from.", "split": "train"},
    ]
    parquet.write_table(pa.Table.from_pylist(pages), corpus / "passages.parquet")
    settings = rag(recipe, distractors=[str(corpus / "passages.parquet")], no_answer_share=0.0)
    examples = Examples(corpus, settings, 0)
    assert ("Peru", "A page to learn from.") in examples.passages
    assert not [text for _, text in examples.passages if "planted" in text]

    ranked = tmp_path / "ranked.jsonl"
    shown = [{"title": "Oman", "text": "A planted page."}, *GOLD]
    ranked.write_text(json.dumps(row(2, answers=["Muscat"], passages=shown, gold=[1])) + "\n")
    examples = Examples(corpus, rag(recipe, questions=[str(ranked)]), 0)
    assert not [text for _, text in examples.passages if "planted" in text]
    assert str(examples.left_out) == "1 that show a passage which the corpus holds out"
    capfd.readouterr()
    policy_task(model, corpus, asked_policy(recipe, questions=[str(ranked)]), 0, tmp_path)
    said = "policy: 1 of 3 questions left out: 1 that show a passage which the corpus holds out"
    assert said in capfd.readouterr().err
