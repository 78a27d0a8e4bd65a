"""The service under load beside its engine alone, on the same requests: `refrag bench service`.

Clients are processes of their own and speak HTTP; the engine is asked by as many threads of the server's process. Both
first one request after the other, then all at once for some seconds, each client with a new one as soon as it has its
answer.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refrag_platform.bench.clients import ClientLoad, Reply
from refrag_platform.bench.machine import runs_on
from refrag_platform.bench.resident import resident_bytes
from refrag_platform.corpus.question import Question
from refrag_platform.errors import RefragError
from refrag_platform.model.loading import Bundle
from refrag_platform.progress import waiting
from refrag_platform.recipes import Recipe

if TYPE_CHECKING:
    from refrag_platform.serving.engine import Engine
    from refrag_platform.serving.settings import ApiSettings

# Requests one after the other, and the seconds that they may take.
ALONE, LONGEST = 20, 600.0
# As a share of what is measured.
WARM_UP = 0.25
# A process of clients keeps up with as many; where there are few cores, it has more.
CLIENTS_A_PROCESS = 16
ENOUGH_FOR_P99 = 100


@dataclass(frozen=True)
class ServicePlan:
    """clients: at once. seconds: of load. new_tokens: of an answer at most. share_kept: p; None: the policy's."""

    clients: int
    seconds: float
    new_tokens: int
    share_kept: float | None = None


@contextmanager
def fresh_engine(bundle: Bundle, recipe: Recipe, slots: int | None) -> Iterator[Engine]:
    """A model's engine without a store, which uses nothing of earlier prompts again: each side is asked the same.

    Args: slots: in place of the recipe's.
    """
    from refrag_platform.serving.engine import Engine

    settings = recipe.serving.model_copy(update={"slots": slots or recipe.serving.slots, "prefix_cache_mb": 0})
    engine = Engine(recipe.name, bundle, None, settings)
    try:
        yield engine
    finally:
        engine.close()


def bench_service(engine: Engine, questions: Sequence[Question], plan: ServicePlan) -> dict[str, Any]:
    """Rows of engine and service, for one client and for all, and what the service adds and keeps.

    Args: questions: with their passages, which every request brings along; the text of the question is continued.

    Raises:
        RefragError: one is no question over passages, clients can't be started, or no answer came at all.
    """
    from refrag_platform.serving.settings import ApiSettings

    if wrong := next((one for one in questions if not one.question or not one.passages), None):
        raise RefragError(f"{wrong.where}: {wrong.id} is no question over passages, which is what is asked")
    bodies = [_body(engine.name, one, plan) for one in questions]
    rows: list[dict[str, Any]] = []
    with served(engine, ApiSettings(max_waiting=plan.clients)) as url:
        sides = {
            "engine": lambda load: _ask_engine(engine, questions, plan, load),
            "service": _ask_service,
        }
        for clients, seconds, requests in ((1, LONGEST, ALONE), (plan.clients, plan.seconds, 0)):
            load = ClientLoad(f"{url}/v1/completions", clients, seconds, requests, bodies, first=0, stride=clients)
            # Compilation, connections, and memory that is taken once.
            warm_up = replace(load, seconds=seconds * WARM_UP, requests=math.ceil(requests * WARM_UP))
            for side, asks in sides.items():
                with waiting(f"{side}, {clients} at once"):
                    asks(warm_up)
                    before = resident_bytes()
                    answers, took = asks(load)
                rows.append(_row(side, clients, answers, took, (resident_bytes() - before) / 2**20))
    machine = {"model": engine.name, **runs_on(engine.bundle.model.decoder), "slots": engine.settings.slots}
    return {"benchmark": "service", **machine, **asdict(plan), "rows": rows, **_compared(rows)}


def _body(model: str, question: Question, plan: ServicePlan) -> dict[str, Any]:
    passages = [{"title": title, "text": text} for title, text in question.passages]
    asked = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": plan.new_tokens}
    return {"model": model, "prompt": question.question, "passages": passages, "share_kept": plan.share_kept, **asked}


def _ask_engine(
    engine: Engine, questions: Sequence[Question], plan: ServicePlan, load: ClientLoad
) -> tuple[list[Reply], float]:
    """The answers and the seconds that they took, without HTTP."""
    from refrag_platform.serving.contract import Message, Sampling, ServedPassage

    begun = time.monotonic()

    def asks(number: int) -> list[Reply]:
        answers: list[Reply] = []
        while time.monotonic() - begun < load.seconds and (not load.requests or len(answers) < load.requests):
            question = questions[(number + len(answers) * load.stride) % len(questions)]
            sent = [ServedPassage(str(place), *passage) for place, passage in enumerate(question.passages)]
            asked, first = time.monotonic(), None
            generation = engine.ask(
                [Message("user", question.question)],
                0,
                sent,
                Sampling(plan.new_tokens),
                plan.share_kept,
                continues=True,
            )
            for text in generation:
                if first is None and text:
                    first = (time.monotonic() - asked) * 1000
            answers.append(Reply(200, first, generation.usage.completion_tokens))
        return answers

    with ThreadPoolExecutor(load.clients) as threads:
        answers = [one for replies in threads.map(asks, range(load.clients)) for one in replies]
    return answers, time.monotonic() - begun


def _ask_service(load: ClientLoad) -> tuple[list[Reply], float]:
    """What processes of clients saw, together, from when the first of them began to when the last had ended."""
    count = max(1, min(load.clients // CLIENTS_A_PROCESS, (os.cpu_count() or 1) // 2))
    shares = [load.clients // count + (number < load.clients % count) for number in range(count)]
    command = [sys.executable, "-P", "-m", "refrag_platform.bench.clients"]
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with ThreadPoolExecutor(count) as threads:

        def run(number: int) -> dict[str, Any]:
            part = replace(load, clients=shares[number], first=sum(shares[:number]))
            done = subprocess.run(
                command, input=dumps(asdict(part)), capture_output=True, text=True, env=environment, check=False
            )
            if done.returncode:
                raise RefragError(f"clients ended with {done.returncode}: {done.stderr.strip()[-500:]}")
            return dict(loads(done.stdout))

        seen = list(threads.map(run, range(count)))
    took = max(process["ended"] for process in seen) - min(process["begun"] for process in seen)
    return [Reply(**one) for process in seen for one in process["answers"]], took


def _row(side: str, clients: int, answers: Sequence[Reply], took: float, grown_mb: float) -> dict[str, Any]:
    firsts = [one.first_ms for one in answers if one.first_ms is not None]
    if not firsts:
        said = ", ".join(f"{count:,} x {status}" for status, count in Counter(one.status for one in answers).items())
        raise RefragError(f"{side}: none of {len(answers):,} answers has a text (status {said}); see the log above")
    # Of fewer the 99th would be the largest alone.
    shares = (50, 95, 99) if len(firsts) >= ENOUGH_FOR_P99 else (50, 95)
    return {
        "side": side,
        "clients": clients,
        "requests": len(answers),
        "statuses": {str(status): count for status, count in sorted(Counter(one.status for one in answers).items())},
        "tokens": sum(one.tokens for one in answers),
        "seconds": round(took, 3),
        "tokens_per_second": round(sum(one.tokens for one in answers) / took, 2),
        "requests_per_second": round(sum(one.status == 200 for one in answers) / took, 3),
        "ttft_ms": {f"p{share}": round(float(np.percentile(firsts, share)), 3) for share in shares},
        "grown_mb": round(grown_mb, 3),
    }


def _compared(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What HTTP adds to one client's first token, and the share of the engine's tokens that all clients get."""
    engine, service = ([row for row in rows if row["side"] == side] for side in ("engine", "service"))
    return {
        "added_ms": round(service[0]["ttft_ms"]["p50"] - engine[0]["ttft_ms"]["p50"], 3),
        "share_of_engine": round(service[1]["tokens_per_second"] / engine[1]["tokens_per_second"], 4),
        "mean_tokens": round(sum(row["tokens"] for row in rows) / sum(row["statuses"]["200"] for row in rows), 2),
    }


@contextmanager
def served(engine: Engine, settings: ApiSettings) -> Iterator[str]:
    """The URL of the service of an engine, under uvicorn as it is served."""
    from refrag_platform.serving.api import create_app
    from refrag_platform.serving.plain import on_thread

    app = create_app(engine.name, settings)
    app.state.engine = engine
    with on_thread(app) as url:
        yield url
