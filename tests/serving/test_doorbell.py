"""How what the decoder's thread writes reaches the loop that sends it."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from refrag_platform.serving import admission
from refrag_platform.serving.doorbell import Doorbell
from tests.serving.conftest import Server, client_of


def test_the_loop_runs_whatever_threads_hand_in_and_is_woken_once_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    async def hand_in() -> int:
        loop, woken = asyncio.get_running_loop(), 0
        wake = loop.call_soon_threadsafe

        def counted(*call: object) -> object:
            nonlocal woken
            woken += 1
            return wake(*call)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        bell = Doorbell(loop)
        for number in range(100):
            bell.ring(lambda number=number: ran.append(number))  # type: ignore[misc]
        # The loop didn't get a turn meanwhile.
        assert (ran, woken) == ([], 1)
        await asyncio.sleep(0)
        assert ran == list(range(100))
        threads = [threading.Thread(target=lambda: bell.ring(lambda: ran.append(-1))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        await asyncio.sleep(0)
        return ran.count(-1)

    assert asyncio.run(hand_in()) == 8


def test_a_loop_that_is_closed_takes_no_more_and_its_threads_go_on() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    Doorbell(loop).ring(lambda: pytest.fail("ran on a closed loop"))


def test_an_answer_goes_on_while_every_request_thread_is_busy(
    server: Server, slow_decoder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, free = ThreadPoolExecutor(1), threading.Event()
    monkeypatch.setattr(admission, "ThreadPoolExecutor", lambda *_, **__: threads)
    with server() as url:
        asked = {"messages": [{"role": "user", "content": "What is the capital of Peru?"}], "max_tokens": 20}
        stream = client_of(url).chat.completions.create(
            model="tiny",
            stream=True,
            extra_body={"retrieve": 0},
            **asked,  # type: ignore[call-overload]
        )
        assert next(iter(stream)).choices[0].delta.role == "assistant"
        threads.submit(free.wait, 60)
        try:
            finish = [chunk.choices[0].finish_reason for chunk in stream]
            assert finish[-1] == "length"
        finally:
            free.set()
