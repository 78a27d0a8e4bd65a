"""The policy's episodes."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.prompts import passage_chunks
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import unchunk
from refrag_platform.recipes import PolicyRecipe
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.store.retriever import HashedWords
from refrag_platform.training.core.loop import TrainingInterrupted, train
from refrag_platform.training.evidence import HAS_ANSWER
from refrag_platform.training.policy import policy_task
from tests.training.conftest import repeating_documents, write_corpus


def settings(**values: object) -> PolicyRecipe:
    usual = {"steps": 6, "batch_size": 4, "share_kept": 0.25, "context_tokens": 32, "output_tokens": 8}
    small = {"group_size": 3, "hidden_size": 32, "heads": 2, "precision": "fp32", "log_every": 1, "save_every": 100}
    return PolicyRecipe.model_validate({**usual, **small, **values})


def write_questions(path: Path) -> Path:
    rows = [
        {
            "question": f"What is number {n}?",
            "answers": [f"answer {n}"],
            "passages": [{"title": f"T{n}", "text": f"It is answer {n}, of course."}],
            "gold": [0],
        }
        for n in range(8)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", repeating_documents(64, 4, 8, range(10, 200)))


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_a_budget_that_leaves_nothing_to_choose_is_refused(model: RefragModel, corpus: Path, share: float) -> None:
    with pytest.raises(RecipeError, match=r"policy\.share_kept .*nothing to choose"):
        policy_task(model, corpus, settings(share_kept=share), 0)


def test_a_policy_that_would_never_see_a_question_is_refused() -> None:
    with pytest.raises(ValidationError, match="never see one"):
        settings(query="question")
    with pytest.raises(ValidationError, match="nothing is near to no question"):
        settings(relevance="hash")


def test_questions_come_from_the_corpus_and_from_the_recipe_s_files(
    model: RefragModel, corpus: Path, tmp_path: Path
) -> None:
    wanted = settings(question_share=1.0, query="question")
    with pytest.raises(RefragError, match=r"policy\.questions"):
        policy_task(model, corpus, wanted, 0)
    write_questions(tmp_path / "asked.jsonl")
    by_file = policy_task(model, corpus, wanted.model_copy(update={"questions": ["asked.jsonl"]}), 0, tmp_path)
    write_questions(corpus / "questions" / "train.jsonl")
    by_corpus = policy_task(model, corpus, wanted, 0)
    batches = [task.batch(0, 0, 4, 0, 1) for task in (by_file, by_corpus)]
    assert torch.equal(batches[0]["chunks"], batches[1]["chunks"])
    assert batches[0]["question"].shape[1] > 0


def test_an_episode_knows_the_chunks_of_its_gold_passage_that_hold_the_answer(
    model: RefragModel, corpus: Path, tmp_path: Path
) -> None:
    asked = settings(question_share=1.0, questions=[str(write_questions(tmp_path / "own.jsonl"))], passages=3)
    task = policy_task(model, corpus, asked, 0)
    assert task.questions
    for row in range(4):
        episode = task.questions.draw(0, [row])[0]
        assert episode.evidence is not None and not episode.evidence.all()
        held = model.tokenizer.decode(unchunk(episode.chunks[episode.evidence == HAS_ANSWER]))
        assert str(model.tokenizer.decode(episode.output)).strip() in str(held)


def test_a_ranked_episode_has_its_passages_as_listed(model: RefragModel, corpus: Path, tmp_path: Path) -> None:
    texts = ["the first one here", "it is gold, of course", "and this is a third"]
    passages = [{"title": "", "text": text} for text in texts]
    row = {"question": "What is it?", "answers": ["gold"], "passages": passages, "gold": [1]}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    asked = settings(question_share=1.0, questions=[str(tmp_path / "own.jsonl")], passages=3, ranked_share=1.0)
    questions = policy_task(model, corpus, asked, 0).questions
    assert questions
    cut = [passage_chunks(model.tokenizer, "", text, model.chunk_size).token_ids for text in texts]
    assert all(torch.equal(questions.draw(0, [row])[0].chunks, torch.cat(cut)) for row in range(4))


def test_where_gold_alone_is_listed_its_chunks_stand_anywhere(model: RefragModel, corpus: Path, tmp_path: Path) -> None:
    own = str(write_questions(tmp_path / "own.jsonl"))
    asked = settings(question_share=1.0, questions=[own], passages=3, ranked_share=1.0)
    questions = policy_task(model, corpus, asked, 0).questions
    assert questions and all(len(question.passages) == 1 for question in questions.questions)
    evidence = [questions.draw(0, [row])[0].evidence for row in range(20)]
    assert len({int((levels > 0).nonzero()[0]) for levels in evidence if levels is not None}) > 1


def test_training_goes_on_from_a_policy_and_refuses_one_of_another_shape(
    model: RefragModel, corpus: Path, tmp_path: Path
) -> None:
    asked = settings(question_share=1.0, query="question", questions=[str(write_questions(tmp_path / "own.jsonl"))])
    start = PolicyNetwork(model.vector_dim, 32, 2, 2, 0.5, "question")
    with torch.no_grad():
        start.inner.weight.fill_(0.5)
    task = policy_task(model, corpus, asked, 0, start=start)
    # Its metric, too, is not taken anew.
    assert all(torch.equal(tensor, start.state_dict()[name]) for name, tensor in task.policy.state_dict().items())
    assert task.policy.share_kept == 0.25
    with pytest.raises(RecipeError, match="its heads is 2, not 4"):
        policy_task(model, corpus, asked.model_copy(update={"heads": 4}), 0, start=start)
    # What the passages' relevance says is new to it.
    told = policy_task(model, corpus, asked.model_copy(update={"relevance": "hash"}), 0, start=start).policy
    assert told.reads_relevance and told.relevance.weight.any()
    assert all(torch.equal(told.state_dict()[name], tensor) for name, tensor in start.state_dict().items())
    with pytest.raises(RecipeError, match="its relevance is True, not False"):
        policy_task(model, corpus, asked, 0, start=told)


def test_first_steps_learn_from_evidence_alone_and_then_rewards_come(
    model: RefragModel, corpus: Path, tmp_path: Path
) -> None:
    write_questions(corpus / "questions" / "train.jsonl")
    # Windows have no evidence: until there are rewards, all is questions.
    wanted = settings(query="question", question_share=0.5, passages=3, evidence_steps=3, evidence_weight=0.5)
    task = policy_task(model, corpus, wanted, 0)
    train(task, wanted, tmp_path / "work", "policy")
    lines = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert [("reward" in line) for line in lines] == [False] * 3 + [True] * 3
    assert all(0 < line["loss"] == pytest.approx(line["evidence_loss"]) for line in lines[:3])
    assert all(0 <= line["answer_kept"] <= 1 for line in lines[:3])


def test_evidence_beside_the_reward_has_its_weight(model: RefragModel, corpus: Path, tmp_path: Path) -> None:
    write_questions(corpus / "questions" / "train.jsonl")
    losses = []
    for weight in (0.0, 0.5, 2.0):
        task = policy_task(model, corpus, settings(question_share=1.0, passages=3, evidence_weight=weight), 0)
        batch = task.batch(0, 0, 4, 0, 1)
        task.prepare_updates(batch)
        losses.append(task(batch)[0])
    assert losses[1] > losses[0]
    torch.testing.assert_close((losses[2] - losses[0]) / (losses[1] - losses[0]), torch.tensor(4.0))


def test_where_gold_is_not_known_mentions_alone_are_evidence(model: RefragModel, corpus: Path, tmp_path: Path) -> None:
    passages = [
        {"title": "", "text": "nothing of the kind stands here"},
        {"title": "", "text": "it is gold, of course"},
    ]
    row = {"question": "What is it?", "answers": ["gold"], "passages": passages}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    asked = settings(question_share=1.0, questions=[str(tmp_path / "own.jsonl")], passages=2)
    questions = policy_task(model, corpus, asked, 0).questions
    assert questions
    evidence = questions.draw(0, [0])[0].evidence
    assert evidence is not None and set(evidence.tolist()) == {0, HAS_ANSWER}


def test_windows_and_questions_mix_and_a_resumed_run_goes_on_as_one_that_was_not_stopped(
    model: RefragModel, corpus: Path, tmp_path: Path
) -> None:
    write_questions(corpus / "questions" / "train.jsonl")
    wanted = settings(query="question", question_share=0.5, passages=3, min_passages=2, relevance="hash")

    def run(work: Path, **options: int) -> dict[str, torch.Tensor]:
        task = policy_task(model, corpus, wanted, 0, relevance=PassageRelevance(HashedWords()))
        asked = [task.batch(step, 0, 4, 0, 1)["question"].shape[1] > 0 for step in range(wanted.steps)]
        assert any(asked) and not all(asked)
        train(task, wanted, work, "policy", **options)  # type: ignore[arg-type]
        assert all(name.startswith("policy.") for name in task.state_dict())
        return task.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "stopped", stop_after=3)
    resumed = run(tmp_path / "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert whole["policy.match.weight"].any() and whole["policy.relevance_lift.weight"].any()


def test_most_episodes_say_how_near_each_chunk_s_passage_is(model: RefragModel, corpus: Path, tmp_path: Path) -> None:
    own = str(write_questions(tmp_path / "own.jsonl"))
    asked = settings(query="question", question_share=1.0, questions=[own], passages=3, relevance="hash")
    questions = policy_task(model, corpus, asked, 0, relevance=PassageRelevance(HashedWords())).questions
    assert questions
    drawn = questions.draw(0, range(60))
    assert torch.equal(questions.draw(0, [7])[0].chunks, drawn[7].chunks)
    told = [one.relevance for one in drawn if one.relevance is not None and one.relevance.isfinite().all()]
    unknown = [one for one in drawn if one.relevance is not None and one.relevance.isnan().all()]
    assert len(told) + len(unknown) == 60 and 30 < len(told) < 60
    assert all(len(values.unique()) > 1 for values in told)


def test_the_number_of_passages_is_drawn_for_each_step(model: RefragModel, corpus: Path, tmp_path: Path) -> None:
    own = str(write_questions(tmp_path / "own.jsonl"))
    asked = settings(question_share=1.0, questions=[own], passages=5, min_passages=2)
    questions = policy_task(model, corpus, asked, 0).questions
    assert questions
    counts = [{len(one.chunks) for one in questions.draw(step, range(4))} for step in range(12)]
    # Every passage is one of the questions' own, of as many chunks.
    assert all(len(lengths) == 1 for lengths in counts) and len(set.union(*counts)) > 2
    with pytest.raises(ValidationError, match="min_passages is 6, more than passages"):
        settings(question_share=1.0, passages=5, min_passages=6)


def test_a_policy_that_reads_questions_has_the_metric_of_the_passages_chunks(
    model: RefragModel, corpus: Path, tmp_path: Path
) -> None:
    asked = settings(question_share=1.0, query="question", questions=[str(write_questions(tmp_path / "own.jsonl"))])
    task, again = (policy_task(model, corpus, asked, 0) for _ in range(2))
    assert task.policy.metric.abs().max() > 0 and torch.equal(task.policy.metric, again.policy.metric)
    train(task, asked, tmp_path / "work", "policy")
    assert torch.equal(task.policy.metric, again.policy.metric)
