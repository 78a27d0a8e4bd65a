"""Requests that share the decoder get what each would get alone, leave nothing behind, and delay nobody."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from refrag_platform.decoding.prefix import PrefixCache
from refrag_platform.decoding.prompts import PromptInput, prompt_input
from refrag_platform.decoding.runner import DecoderRunner
from refrag_platform.decoding.sampling import Token
from refrag_platform.decoding.scheduler import Scheduler
from refrag_platform.decoding.settings import Sampling
from refrag_platform.decoding.stream import Stream
from refrag_platform.errors import RefragError
from refrag_platform.model.generate import generate
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Prompt, Text, chunk_tokens
from tests.decoding.conftest import create, random_embeds
from tests.processes import wait_for

Make = Callable[..., DecoderRunner]


def a_prompt(model: RefragModel, seed: int, chunks: int = 10) -> Prompt:
    draw = np.random.default_rng(seed)
    ids = chunk_tokens(draw.integers(3, 400, model.chunk_size * chunks).tolist(), model.chunk_size)
    # Ids that every vocabulary of the tests has.
    return [Text([1, 2]), Chunks(ids, torch.from_numpy(draw.random(chunks) < 0.3)), Text([5, 6 + seed])]


def read(stream: Stream, choice: int = 0) -> list[int]:
    return [event.token.id for event in stream if event.token is not None and event.choice == choice]


@pytest.fixture
def scheduler(make_runner: Make) -> Iterator[Scheduler]:
    with Scheduler(make_runner(), prefill_positions=16) as made:
        yield made


def hold(runner: DecoderRunner) -> tuple[threading.Event, list[int]]:
    """Let each step wait for this event, so that no answer is over before a test is ready, and list the steps' batches.

    A prefill, which draws the first token, doesn't wait.
    """
    goes_on, batches, decode = threading.Event(), list[int](), runner.decode

    def held(token_ids: list[int], *where: Any) -> torch.Tensor:
        batches.append(len(token_ids))
        assert goes_on.wait(60)
        return decode(token_ids, *where)

    runner.decode = held  # type: ignore[method-assign]
    return goes_on, batches


def is_idle(scheduler: Scheduler) -> bool:
    """Waits for the thread: what ended is freed within a step."""
    for _ in range(1000):
        if not scheduler.load().running:
            return True
        threading.Event().wait(0.01)
    return False


def test_batches_of_1_to_16_say_what_each_says_alone(recipe: str, model: RefragModel, make_runner: Make) -> None:
    prompts = [a_prompt(model, seed, 3 + seed) for seed in range(16)]
    alone = [list(generate(model, prompt, 5)) for prompt in prompts]
    with Scheduler(make_runner(max_batch=16), prefill_positions=64) as scheduler:
        for batch in range(1, 17) if recipe == "tiny" else (2, 16):
            streams = [scheduler.submit(prompt_input(model, prompt), Sampling(5)) for prompt in prompts[:batch]]
            assert [read(stream) for stream in streams] == alone[:batch]
        assert is_idle(scheduler)


def test_in_bfloat16_a_batch_differs_only_at_near_ties(recipe: str, model: RefragModel) -> None:
    """Where it does, `pytest -s` prints how near the two tokens were."""
    low = create(recipe).to(model.device, torch.bfloat16)
    prompts = [prompt_input(low, a_prompt(model, seed, 3 + seed)) for seed in range(16)]
    runner = DecoderRunner(low.decoder, max_positions=200, max_batch=16, dynamic=True)
    sampling = Sampling(12, top_logprobs=2)

    def tokens(stream: Stream) -> list[Token]:
        return [event.token for event in stream if event.token is not None]

    with Scheduler(runner) as scheduler:
        alone = [tokens(scheduler.submit(prompt, sampling)) for prompt in prompts]
        streams = [scheduler.submit(prompt, sampling) for prompt in prompts]
        for number, (one, stream) in enumerate(zip(alone, streams, strict=True)):
            pairs = enumerate(zip(one, tokens(stream), strict=True))
            apart = next(((place, token) for place, (token, other) in pairs if token.id != other.id), None)
            if apart is not None:
                place, token = apart
                gap = token.top[0][1] - token.top[1][1]
                print(f"prompt {number}, token {place}: a near tie, {gap:.4f} nats apart")
                assert gap <= 0.25  # two steps of bfloat16 at logits of 16 to 32


def test_requests_beyond_the_slots_wait_and_are_answered(model: RefragModel, scheduler: Scheduler) -> None:
    prompts = [a_prompt(model, seed) for seed in range(11)]
    with ThreadPoolExecutor(11) as pool:
        answers = list(pool.map(lambda p: read(scheduler.submit(prompt_input(model, p), Sampling(5))), prompts))
    assert answers == [list(generate(model, prompt, 5)) for prompt in prompts]


def test_a_stop_id_ends_an_answer_and_is_not_said(model: RefragModel, scheduler: Scheduler) -> None:
    prompt = prompt_input(model, a_prompt(model, 0))
    *said, last = scheduler.submit(prompt, Sampling(8))
    assert last.finish_reason == "length"
    ids = [event.token.id for event in said if event.token]
    stop = next(token for token in ids if token != ids[0])
    events = list(scheduler.submit(prompt, Sampling(8), {stop}))
    assert [event.token.id for event in events[:-1] if event.token] == ids[: ids.index(stop)]
    assert (events[-1].token, events[-1].finish_reason) == (None, "stop")


def test_a_long_prefill_does_not_stall_a_running_stream(model: RefragModel, make_runner: Make) -> None:
    """In 16 pieces of a prefill, 16 tokens of a stream that runs already come."""
    order: list[str] = []
    runner = make_runner(max_positions=600)
    prefill, decode = runner.prefill, runner.decode
    runner.prefill = lambda *a: order.append("prefill") or prefill(*a)  # type: ignore[method-assign,func-returns-value]
    runner.decode = lambda *a: order.append("decode") or decode(*a)  # type: ignore[method-assign,func-returns-value]
    goes_on, _ = hold(runner)
    with Scheduler(runner, prefill_positions=32) as scheduler:
        running = scheduler.submit(PromptInput(random_embeds(model, 4), np.empty((4, 5))), Sampling(200))
        events = iter(running)
        next(events)
        long = PromptInput(random_embeds(model, 512), np.empty((512, 5)))
        prefilled = scheduler.submit(long, Sampling(1))
        goes_on.set()
        assert len(read(prefilled)) == 1
        running.cancel()
    begin = order.index("prefill", 1)
    pieces = [call for call in order[begin:] if call == "prefill"]
    assert len(pieces) == 16
    assert "prefill prefill" not in " ".join(order)


def test_a_cancelled_request_frees_its_slot(model: RefragModel, scheduler: Scheduler) -> None:
    goes_on, batches = hold(scheduler.runner)
    stream = scheduler.submit(prompt_input(model, a_prompt(model, 0)), Sampling(100))
    next(iter(stream))
    assert scheduler.load().running == 1
    stream.cancel()
    goes_on.set()
    assert read(stream) == []
    assert is_idle(scheduler) and batches == [1]
    waiting = [scheduler.submit(prompt_input(model, a_prompt(model, 0)), Sampling(100)) for _ in range(8)]
    for stream in waiting:
        stream.cancel()
    assert is_idle(scheduler)
    assert len(read(scheduler.submit(prompt_input(model, a_prompt(model, 1)), Sampling(3)))) == 3


def test_choices_share_a_prefill_and_differ_by_seed(model: RefragModel, scheduler: Scheduler) -> None:
    prompt = prompt_input(model, a_prompt(model, 0))
    events = list(scheduler.submit(prompt, Sampling(6, temperature=1.0, seed=4, n=3)))
    choices = [[event.token.id for event in events if event.token and event.choice == number] for number in range(3)]
    alone = [read(scheduler.submit(prompt, Sampling(6, temperature=1.0, seed=4 + number))) for number in range(3)]
    assert choices == alone
    assert len({tuple(choice) for choice in choices}) == 3
    assert is_idle(scheduler)


def test_one_choice_is_stopped_and_the_others_go_on(model: RefragModel, scheduler: Scheduler) -> None:
    stream = scheduler.submit(prompt_input(model, a_prompt(model, 0)), Sampling(20, n=2))
    counts = [0, 0]
    for event in stream:
        counts[event.choice] += event.token is not None
        if counts[0] == 2:
            stream.stop(0)
    assert counts == [2, 20]
    assert is_idle(scheduler)


def test_the_cap_on_tokens_in_flight_holds(model: RefragModel, make_runner: Make) -> None:
    prompts = [prompt_input(model, a_prompt(model, seed, 2)) for seed in range(4)]
    cost = len(prompts[0].embeds) + 30
    goes_on, batches = hold(runner := make_runner())
    with Scheduler(runner, max_tokens_in_flight=2 * cost + 5) as scheduler:
        streams = [scheduler.submit(prompt, Sampling(20)) for prompt in prompts]
        goes_on.set()
        assert [len(read(stream)) for stream in streams] == [20] * 4
    assert max(batches) == 2


def test_what_can_never_run_is_refused_at_once(model: RefragModel, scheduler: Scheduler) -> None:
    prompt = prompt_input(model, a_prompt(model, 0))
    with pytest.raises(RefragError, match="more than a slot's 200 positions"):
        scheduler.submit(prompt, Sampling(195))
    with pytest.raises(RefragError, match="5 choices"):
        scheduler.submit(prompt, Sampling(2, n=5))


def test_an_error_reaches_its_caller_and_nobody_else(model: RefragModel, scheduler: Scheduler) -> None:
    running = scheduler.submit(prompt_input(model, a_prompt(model, 0)), Sampling(50))
    events = iter(running)
    next(events)
    broken = PromptInput(torch.zeros(8, 3, device=model.device), np.empty((8, 5)))  # no decoder is 3 wide
    with pytest.raises(RefragError, match="the answer failed"):
        read(scheduler.submit(broken, Sampling(4)))
    assert sum(event.token is not None for event in events) == 49
    assert is_idle(scheduler)


def test_a_closed_scheduler_fails_its_streams(model: RefragModel, make_runner: Make) -> None:
    runner = make_runner()
    decode = runner.decode

    def decode_once_closed(*given: Any) -> torch.Tensor:
        wait_for(lambda: not scheduler.alive, 60)
        return decode(*given)

    runner.decode = decode_once_closed  # type: ignore[method-assign]
    scheduler = Scheduler(runner)
    stream = scheduler.submit(prompt_input(model, a_prompt(model, 0)), Sampling(150))
    scheduler.close()
    with pytest.raises(RefragError, match="shut down"):
        read(stream)
    with pytest.raises(RefragError, match="shut down"):
        scheduler.submit(prompt_input(model, a_prompt(model, 0)), Sampling(1))


def test_a_decoder_s_thread_that_dies_fails_its_streams(
    model: RefragModel, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies() -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(scheduler, "_prefill", dies)
    with pytest.raises(RefragError, match="no more"):
        read(scheduler.submit(prompt_input(model, a_prompt(model, 0)), Sampling(3)))


def test_what_is_no_number_fails_its_request_and_no_later_one(model: RefragModel, make_runner: Make) -> None:
    longer = prompt_input(model, a_prompt(model, 0))
    prompt = PromptInput(longer.embeds[:-1], longer.content[:-1])
    nan = torch.full_like(longer.embeds, float("nan"))
    with Scheduler(make_runner(max_batch=1), prefill_positions=4) as scheduler:
        expected = read(scheduler.submit(prompt, Sampling(5)))
        for times in (1, 3):
            broken = PromptInput(nan.repeat(times, 1), np.repeat(longer.content, times, 0))
            with pytest.raises(RefragError, match="highest logit is nan"):
                read(scheduler.submit(broken, Sampling(5)))
            assert read(scheduler.submit(prompt, Sampling(5))) == expected


def test_nan_of_a_request_that_was_cancelled_leaves_with_it(
    model: RefragModel, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_input(model, a_prompt(model, 0))
    expected = read(scheduler.submit(prompt, Sampling(5)))
    embeds = torch.full_like(prompt.embeds[:1], float("nan")).expand(190, -1)
    long = PromptInput(embeds, np.resize(prompt.content, (190, prompt.content.shape[1])))
    begun, prefill = threading.Event(), scheduler.runner.prefill

    def watched(*given: Any) -> torch.Tensor:
        found = prefill(*given)
        if given[2]:
            begun.set()
            assert stream_cancelled.wait(20)
        return found

    stream_cancelled = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.runner, "prefill", watched)
        stream = scheduler.submit(long, Sampling(5))
        assert begun.wait(20)
        stream.cancel()
        stream_cancelled.set()
        assert is_idle(scheduler)
    assert read(scheduler.submit(prompt, Sampling(5))) == expected


@pytest.mark.parametrize("call", ["prefill", "decode"])
def test_after_a_fault_of_the_device_nothing_is_taken(
    model: RefragModel, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def faults(*given: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    assert scheduler.alive
    monkeypatch.setattr(scheduler.runner, call, faults)
    with pytest.raises(RefragError, match="illegal memory access"):
        read(scheduler.submit(prompt_input(model, a_prompt(model, 0)), Sampling(3)))
    assert not scheduler.alive
    with pytest.raises(RefragError, match="shut down"):
        scheduler.submit(prompt_input(model, a_prompt(model, 0)), Sampling(3))


def test_log_probabilities_are_the_model_s(model: RefragModel, scheduler: Scheduler) -> None:
    prompt = a_prompt(model, 0)
    events = list(scheduler.submit(prompt_input(model, prompt), Sampling(3, temperature=1.0, seed=1, top_logprobs=2)))
    tokens = [event.token for event in events if event.token]
    with torch.no_grad():
        logits = model([[*prompt, Text([token.id for token in tokens])]])[0, -4:-1]
    expected = logits.float().cpu().log_softmax(-1)
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [one for one, _ in token.top] == row.topk(2).indices.tolist()
        assert token.top[0][1] >= token.top[1][1]


def test_a_reused_prefix_gives_the_same_answer(model: RefragModel, make_runner: Make) -> None:
    passages = a_prompt(model, 3, 40)[:-1]
    first, second = [*passages, Text([7, 8])], [*passages, Text([9])]
    runner = make_runner()
    cache = PrefixCache(model.encoder_digest(), 2**28, runner.kv_bytes_per_position, block=8)
    with Scheduler(runner, cache, prefill_positions=16) as scheduler:
        for prompt in (first, second, first):
            stream = scheduler.submit(prompt_input(model, prompt), Sampling(6))
            assert read(stream) == list(generate(model, prompt, 6))
        shared = len(prompt_input(model, passages).content)
        assert 0 < shared - stream.reused <= 8 + 2
