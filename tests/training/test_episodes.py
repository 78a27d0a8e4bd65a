"""Episodes: what is judged, and that a batch of choices is judged as one prompt at a time would be."""

import pytest
import torch

from refrag_platform.corpus.question import Question
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.scoring import score_refrag
from refrag_platform.evaluation.windows import Windows
from refrag_platform.model.policy import select
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Text, chunk_tokens, unchunk
from refrag_platform.training.episodes import (
    Episode,
    QuestionEpisodes,
    collate,
    context_vectors,
    judged_losses,
    log_perplexity,
    window_episode,
)


def episodes() -> list[Episode]:
    """Three prompts of different lengths; passages end in chunks that are not full."""
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 200, (count,), generator=generator).tolist()

    def passages(*lengths: int) -> torch.Tensor:
        return torch.cat([chunk_tokens(tokens(length), 4) for length in lengths])

    return [
        Episode(passages(7, 9), tokens(3), tokens(2), tokens(5), tokens(5)),
        Episode(passages(16, 5, 3), tokens(1), tokens(4), tokens(3), tokens(2)),
        Episode(passages(8), tokens(4), tokens(2), tokens(6), tokens(9)),
    ]


@torch.no_grad()
def test_a_batch_of_choices_is_judged_as_each_prompt_alone(model: RefragModel) -> None:
    model.eval()
    batch = collate(episodes(), 0.4, model.chunk_size)
    mask = batch["chunks"][..., 0] != -1
    random = [torch.rand(mask.shape, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    keep = torch.stack([select(scores, mask, 0.4) for scores in random], 1)
    assert (keep.sum(-1) == batch["kept"][:, None]).all()
    vectors = context_vectors(model, batch)
    found = -log_perplexity(judged_losses(model, batch, vectors, keep), batch["labels"])
    for row, one in enumerate(episodes()):
        for choice in range(3):
            chunks = Chunks(one.chunks, keep[row, choice, : len(one.chunks)])
            logits = model([[Text(one.before), chunks, Text(one.after), Text(one.output)]])[0]
            predicting = logits[-len(one.output) - 1 : -1].log_softmax(-1)
            expected = predicting[torch.arange(len(one.output)), torch.tensor(one.output)].mean()
            torch.testing.assert_close(found[row, choice], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_window_is_judged_as_its_evaluation_scores_it(model: RefragModel) -> None:
    model.eval()
    tokens = torch.randint(0, 200, (3, 40), generator=torch.Generator().manual_seed(0))
    chance = torch.rand(3, 8, generator=torch.Generator().manual_seed(5))
    batch = collate([window_episode(row, 32, model) for row in tokens], 0.25, 4)
    vectors = context_vectors(model, batch)
    losses = judged_losses(model, batch, vectors, select(chance, None, 0.25)[:, None])
    expected = score_refrag(model, None, Windows(tokens, ["a", "b", "c"], 32), 0.25, 2, seed=5)
    torch.testing.assert_close(losses[:, 0].double(), torch.from_numpy(expected), atol=1e-4, rtol=1e-4)


def questions() -> list[Question]:
    return [
        Question(
            str(number),
            f"What is number {number}?",
            (f"answer {number}",),
            ((f"T{number}", f"It is answer {number}, of course."), ("", f"Word {number} says nothing.")),
            gold=(0,),
        )
        for number in range(6)
    ]


def test_a_question_stands_over_its_gold_passage_among_others(model: RefragModel) -> None:
    drawn = QuestionEpisodes(model.tokenizer, questions(), passages=4, chunk_size=4, seed=0)
    places = set()
    for row in range(20):
        episode = drawn.draw(0, [row])[0]
        text = model.tokenizer.decode(unchunk(episode.chunks))
        answer = model.tokenizer.decode(episode.output)
        asked = model.tokenizer.decode(episode.question)
        assert asked == f"What is number {answer.removeprefix('answer ')}?"
        assert text.count(answer) == 1 and text.count(".") == 4
        places.add(text[: text.index(answer)].count("."))
        assert torch.equal(drawn.draw(0, [row])[0].chunks, episode.chunks)
    assert len(places) > 2


def test_a_closed_question_stands_over_just_its_own_passages(model: RefragModel) -> None:
    lands = tuple((f"land {number}", f"It has {number} rivers.") for number in range(4))
    closed = Question("c", "Which of the lands has most?", ("land 3",), lands, gold=(1, 3), closed=True)
    other = Question("o", "Where?", ("here",), (("a", "It is here."), ("b", "Far away.")), gold=(0,))
    drawn = QuestionEpisodes(model.tokenizer, [closed, other], 5, model.chunk_size, seed=0, min_passages=1).draw(
        0, range(30)
    )
    said = [(model.tokenizer.decode(one.question), model.tokenizer.decode(unchunk(one.chunks))) for one in drawn]
    own = [text for question, text in said if "lands" in question]
    assert own and all(all(text in one for _, text in lands) and "here" not in one for one in own)
    assert not any("rivers" in text for question, text in said if "lands" not in question)


def test_questions_without_an_answer_to_learn_from_are_refused(model: RefragModel) -> None:
    asked = [Question("1", "?", (), (("", "text"),)), Question("2", "?", ("a",), ())]
    with pytest.raises(RefragError, match=r"policy\.questions"):
        QuestionEpisodes(model.tokenizer, asked, passages=4, chunk_size=4, seed=0)
