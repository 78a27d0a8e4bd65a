"""The engine: prompt, policy, generation and what it reports, without HTTP."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from refrag_platform.model import precision
from refrag_platform.model.generate import generate
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.prompts import rag_prompt, stop_ids
from refrag_platform.model.segments import Prompt, plain_tokens, prompt_length
from refrag_platform.serving.contract import BadRequest, Message, Sampling, ServedPassage
from refrag_platform.serving.engine import Engine, asked_last
from refrag_platform.serving.generation import NOTHING_FOUND
from tests.encoders import least_cosine
from tests.processes import wait_for

QUESTION = [Message("user", "What is the capital of Peru?")]
LONG = ServedPassage("long", "A long one", "word " * 400)


def test_the_fitting_passage_is_found_first(engine: Engine) -> None:
    found = engine.retrieve("What is the capital of Peru?", 3)
    assert [found[0].title, len(found)] == ["Peru", 3]
    assert found[0].score >= found[1].score >= found[2].score


def test_stored_vectors_give_the_prompt_that_encoding_now_gives(engine: Engine) -> None:
    stored = engine.retrieve("Peru", 1)
    encoded = [ServedPassage("given", stored[0].title, stored[0].text)]
    answers = ["".join(engine.start(QUESTION, passages, Sampling(8), 0.5)) for passages in (stored, encoded)]
    assert answers[0] == answers[1]


def test_sent_passages_are_encoded_in_the_precision_of_the_store_s(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vectors(bf16: bool) -> torch.Tensor:
        monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: bf16)
        found = engine._prompts.select(engine.bundle, [LONG], 0, "")[0].chunks.vectors
        assert found is not None
        return found.float()

    exact, rounded = vectors(False), vectors(True)
    assert not torch.equal(rounded, exact) and least_cosine(rounded, exact) > 0.999


def prompt_of(engine: Engine, passages: list[ServedPassage]) -> Prompt:
    """The question over the passages as the engine ought to put it."""
    selected = engine._prompts.select(engine.bundle, passages, engine.bundle.share_kept, QUESTION[0].content)
    chunks = [one.chunks for one in selected]
    return rag_prompt(engine.bundle.model.tokenizer, QUESTION[0].content, chunks)


def test_an_answer_is_the_decoded_tokens_of_the_prompt(engine: Engine) -> None:
    passages = engine.retrieve("Peru", 2)
    generation = engine.start(QUESTION, passages, Sampling(16))
    text = "".join(generation)
    model = engine.bundle.model
    expected = list(generate(model, prompt_of(engine, passages), 16, stop_ids(model.tokenizer)))
    assert text == model.tokenizer.decode(expected, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
    assert generation.usage.completion_tokens == len(expected)


def test_usage_counts_positions_chunks_and_compression(engine: Engine) -> None:
    generation = engine.start(QUESTION, [LONG], Sampling(1), 0.25)
    usage, citation = generation.usage, generation.sources.citations[0]
    assert usage.prompt_positions == prompt_length(prompt_of(engine, [LONG]))
    assert usage.chunks == citation.chunks
    assert usage.chunks_expanded == citation.chunks_expanded == round(0.25 * usage.chunks)
    # Of the whole prompt, as evaluations count it.
    assert usage.plain_prompt_tokens == len(plain_tokens(prompt_of(engine, [LONG])))
    assert usage.compression_rate == round(usage.plain_prompt_tokens / usage.prompt_positions, 4)
    assert usage.time_to_first_token_ms is None
    list(generation)
    assert generation.usage.time_to_first_token_ms is not None


def test_a_share_that_rounds_to_all_chunks_keeps_all(engine: Engine) -> None:
    usage = engine.start(QUESTION, [ServedPassage("short", "", "Lima is a city by the sea.")], Sampling(1), 0.95).usage
    assert 1 <= usage.chunks < 10 and usage.chunks_expanded == usage.chunks


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_chunk_or_every_chunk_is_expanded_at_the_ends(engine: Engine, share: float) -> None:
    usage = engine.start(QUESTION, [LONG], Sampling(1), share).usage
    assert usage.chunks_expanded == share * usage.chunks
    if share == 1.0:
        assert usage.prompt_positions == usage.plain_prompt_tokens
        assert usage.compression_rate == 1.0


def test_the_budget_of_the_policy_is_the_default(engine: Engine) -> None:
    assert engine.start(QUESTION, [LONG]).usage.share_kept == engine.bundle.share_kept == 0.25


def test_a_prompt_without_passages_is_not_compressed(engine: Engine) -> None:
    generation = engine.start(QUESTION)
    assert generation.usage.prompt_positions == generation.usage.plain_prompt_tokens
    assert (generation.usage.chunks, generation.sources.citations) == (0, [])


def test_a_share_needs_a_policy(engine: Engine) -> None:
    bare = Engine("tiny", dataclasses.replace(engine.bundle, policy=None), engine.store, engine.settings)
    with pytest.raises(BadRequest, match=r"share_kept is 0\.5.*no policy"):
        bare.start(QUESTION, [LONG], share_kept=0.5)
    assert bare.start(QUESTION, [LONG]).usage.chunks_expanded == 0


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(engine: Engine) -> None:
    passages = [LONG] * 4
    with pytest.raises(BadRequest, match=r"takes \d+ decoder positions, the limit of tiny is 1024") as error:
        engine.start(QUESTION, passages, share_kept=1.0)
    assert error.value.code == "context_length_exceeded"
    # Compressed, the same passages fit.
    assert engine.start(QUESTION, passages, Sampling(1), 0.0).usage.prompt_positions < 1024


def test_a_seed_repeats_an_answer_and_another_changes_it(engine: Engine) -> None:
    def answer(seed: int) -> str:
        return "".join(engine.start(QUESTION, sampling=Sampling(24, temperature=1.0, seed=seed)))

    assert answer(1) == answer(1) != answer(2)


def test_an_answer_ends_before_a_stop_string(engine: Engine) -> None:
    sampling = Sampling(24, temperature=1.0, seed=5)
    whole = "".join(engine.start(QUESTION, sampling=sampling))
    stop = whole[len(whole) // 2 :][:3]
    stopped = engine.start(QUESTION, sampling=dataclasses.replace(sampling, stop=(stop,)))
    assert "".join(stopped) == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"


def test_a_full_length_answer_says_so(engine: Engine) -> None:
    generation = engine.start(QUESTION, sampling=Sampling(3))
    list(generation)
    assert (generation.finish_reason, generation.usage.completion_tokens) == ("length", 3)


def test_an_abandoned_answer_frees_its_slot(engine: Engine, slow_decoder: None) -> None:
    abandoned = engine.start(QUESTION, sampling=Sampling(1500, temperature=1.0, seed=1))
    next(iter(abandoned))
    assert engine.decoder_load().running == 1
    abandoned.close()
    assert list(abandoned) == []
    wait_for(lambda: engine.decoder_load().running == 0, 20)


def test_an_answer_that_is_closed_before_it_begins_says_nothing(engine: Engine) -> None:
    closed = engine.start(QUESTION, sampling=Sampling(8))
    closed.close()
    assert list(closed) == []


def test_many_ask_at_once_and_each_gets_its_own_answer(engine: Engine) -> None:
    """More than there are slots; tokenizer, encoder and policy are shared by the threads that build the prompts."""
    texts = [
        f"{word} " * 60 for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    ]

    def answer(text: str) -> str:
        return "".join(engine.start(QUESTION, [ServedPassage("id", "", text)], Sampling(6), 0.5))

    alone = [answer(text) for text in texts]
    with ThreadPoolExecutor(len(texts)) as pool:
        assert list(pool.map(answer, texts)) == alone
    assert len(set(alone)) > 1


def test_the_next_turn_reads_the_passages_no_second_time(engine: Engine) -> None:
    passages = engine.retrieve("Malta Chad Nepal", 4)
    first = engine.start(QUESTION, passages, Sampling(6), 0.25)
    said = "".join(first)
    turns = [*QUESTION, Message("assistant", said), Message("user", "And of Malta?")]
    again = engine.start(turns, passages, Sampling(6), 0.25)
    answer = "".join(again)
    assert first.usage.prompt_positions - again.usage.positions_reused <= 32 + 8  # a block, and the answer's opening
    # Without the kept prefix it is the same; with another expansion the prefix is another.
    bare = Engine("tiny", engine.bundle, None, engine.settings.model_copy(update={"prefix_cache_mb": 0}))
    alone = bare.start(turns, passages, Sampling(6), 0.25)
    assert "".join(alone) == answer and alone.usage.positions_reused == 0
    bare.close()
    other = engine.start(QUESTION, passages, Sampling(1), 0.9)
    list(other)
    assert other.usage.positions_reused < again.usage.positions_reused


def test_choices_have_their_own_text_and_end(engine: Engine) -> None:
    sampling = Sampling(12, temperature=1.0, seed=5, n=3)
    generation = engine.start(QUESTION, sampling=sampling)
    deltas = list(generation.deltas())
    texts = ["".join(delta.text for delta in deltas if delta.choice == number) for number in range(3)]
    assert texts == [
        "".join(engine.start(QUESTION, sampling=Sampling(12, temperature=1.0, seed=5 + number))) for number in range(3)
    ]
    assert sorted(delta.choice for delta in deltas if delta.finish_reason) == [0, 1, 2]
    with pytest.raises(BadRequest, match="n is 9; tiny writes at most 8 choices"):
        engine.start(QUESTION, sampling=Sampling(1, n=9))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 1.0])
def test_citations_are_the_passages_of_which_chunks_were_kept(engine: Engine, share: float) -> None:
    passages = [*engine.retrieve("What is the capital of Peru?", 4), ServedPassage("sent", "", "word " * 40)]
    sources = engine.start(QUESTION, passages, Sampling(1), share).sources
    assert {one.id for one in sources.citations + sources.retrieved} == {passage.id for passage in passages}
    assert all(one.chunks_expanded == 0 for one in sources.retrieved)
    # Where none is kept nobody chose: all were read alike.
    assert all(one.chunks_expanded > 0 for one in sources.citations) or (share == 0 and not sources.retrieved)


@pytest.mark.parametrize(
    ("least", "question", "answered"),
    [
        (0.1, "What is the capital of Peru?", True),
        (0.9, "What is the capital of Peru?", False),
        (0.1, "Who wrote Hamlet?", False),
        (0.1, "?!", False),
        (None, "Who wrote Hamlet?", True),
    ],
)
def test_the_recipe_says_how_near_a_passage_must_be(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, least: float | None, question: str, answered: bool
) -> None:
    monkeypatch.setattr(engine, "settings", engine.settings.model_copy(update={"least_similarity": least}))
    answer = engine.ask([Message("user", question)], 2, sampling=Sampling(2))
    assert answer.sources.answered == answered == ("".join(answer) != NOTHING_FOUND)
    assert answer.sources.least_similarity == least
    assert answer.usage.completion_tokens == (2 if answered else 0)
    if question == QUESTION[0].content:
        assert answer.sources.similarity == engine.retrieve(question, 1)[0].score
        assert (len(answer.sources.retrieved) == 2) == (not answered)


def test_what_can_not_be_asked_is_an_error_whatever_the_store_holds(engine: Engine) -> None:
    for text, sampling, says in (
        ("Who wrote Hamlet? " * 400, Sampling(1), "the limit of tiny is 1024"),
        ("Who wrote Hamlet?", Sampling(2048), "tiny holds 2048 in all"),
        ("Who wrote Hamlet?", Sampling(1, n=9), "at most 8 choices"),
    ):
        with pytest.raises(BadRequest, match=says):
            engine.ask([Message("user", text)], 2, sampling=sampling)


def test_nothing_is_looked_up_where_nothing_is_wanted(engine: Engine) -> None:
    answer = engine.ask([Message("user", "Who wrote Hamlet?")], 0, sampling=Sampling(1))
    assert (answer.sources.answered, answer.sources.similarity) == (True, None)


def test_earlier_turns_are_part_of_the_prompt(engine: Engine) -> None:
    history = [Message("user", "Hello"), Message("assistant", "Hello to you"), *QUESTION]
    short, long = engine.start(QUESTION).usage, engine.start(history).usage
    assert long.prompt_positions > short.prompt_positions


def test_a_policy_that_is_told_relevance_has_the_store_s(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PolicyNetwork(engine.bundle.model.vector_dim, 32, 1, 2, 0.25, "question", relevance=True).eval()
    monkeypatch.setattr(engine, "bundle", dataclasses.replace(engine.bundle, policy=policy))
    question = QUESTION[0].content
    found = engine.retrieve(question, 3)
    sent = [ServedPassage(passage.id, passage.title, passage.text) for passage in found]
    stored, embedded = (
        [one.chunks for one in engine._prompts.select(engine.bundle, read, 0.25, question)] for read in (found, sent)
    )
    assert [part.relevance for part in stored] == [part.relevance for part in embedded]
    assert [part.keep.tolist() for part in stored] == [part.keep.tolist() for part in embedded]
    # The passage about Peru is nearest, and takes all that is kept.
    assert [bool(part.keep.any()) for part in stored] == [True, False, False]
    monkeypatch.setattr(engine._prompts, "_retriever", None)
    assert [one.chunks.relevance for one in engine._prompts.select(engine.bundle, sent, 0.25, question)] == [None] * 3


def test_a_tools_result_is_no_question() -> None:
    asked = [Message("user", "Peru?"), Message("assistant", "I look it up."), Message("user", "And Oman?")]
    result = Message("user", "<tool_response>\n42\n</tool_response>", is_result=True)
    assert asked_last(asked) == ("And Oman?", "Peru?")
    assert asked_last([*asked, result]) == ("And Oman?", "Peru?")
    assert asked_last([*asked, result, Message("user", "So?")]) == ("So?", "Peru?\nAnd Oman?")
    assert asked_last([result]) == (result.content, "")
