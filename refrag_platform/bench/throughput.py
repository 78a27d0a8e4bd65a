"""Tokens per second of one device that is always full: `refrag bench throughput --help`.

As many requests as fit read their context and then generate together; everything counts, reading included.
REFRAG's vectors are on the device already; they are projected anew for every request.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refrag_platform.bench.arithmetic import DecoderSize, Work, projection_work
from refrag_platform.bench.clock import Case, Ceilings, in_turns, timed
from refrag_platform.bench.machine import BUCKETS_PER_OCTAVE, fast, free, measured_on
from refrag_platform.bench.shapes import Subject
from refrag_platform.decoding.runner import DecoderRunner
from refrag_platform.errors import RefragError

logger = logging.getLogger("refrag.bench")

# A batch that doesn't fit is followed by one this much smaller.
STEP_DOWN = 1 / 16
# What reading holds besides keys and values, in layers' inner states of the prompt: once when a step is warmed up, once
# in its graph.
WORKING_STATES = 2


@dataclass(frozen=True)
class ThroughputPlan:
    """context, question, new_tokens: decoder tokens of each request. runs: of the whole batch. largest: batch."""

    context: int
    question: int
    new_tokens: int
    ks: tuple[int, ...]
    runs: int
    largest: int
    seed: int


@torch.inference_mode()
def bench_throughput(
    subject: Subject, plan: ThroughputPlan, on_row: Callable[[dict[str, Any]], object] = lambda row: None
) -> dict[str, Any]:
    """A row for the full context and one for each k, every one at the largest batch that fits.

    Raises:
        RefragError: the context isn't whole chunks, or not even one request fits.
    """
    ceilings = Ceilings.measure(subject.device, subject.dtype)
    rows: list[dict[str, Any]] = []
    for k in (None, *plan.ks):
        if k and plan.context % k:
            raise RefragError(f"context {plan.context} is no multiple of k = {k}; give one that is")
        with fast(subject):
            row = _largest(subject, plan, k, ceilings)
        row["speedup"] = round(row["tokens_per_second"] / (rows or [row])[0]["tokens_per_second"], 3)
        rows.append(row)
        on_row(row)
    facts = {"question": plan.question, "new_tokens": plan.new_tokens, "seed": plan.seed}
    return {
        "benchmark": "throughput",
        **measured_on(subject.name, subject.weights, subject.decoder, ceilings),
        **facts,
        "rows": rows,
    }


def _largest(subject: Subject, plan: ThroughputPlan, k: int | None, ceilings: Ceilings) -> dict[str, Any]:
    kept = plan.context // (k or 1) + plan.question + plan.new_tokens
    free()
    room = _free_bytes(subject.device) - _working_bytes(subject, kept - plan.new_tokens)
    size = DecoderSize.of(subject.decoder)
    # The compiler tries kernels on a copy of what they write: one layer's keys and values.
    copied = 1 / size.layers if subject.device.type == "cuda" else 0
    batch = min(plan.largest, int(room / (size.kv_bytes(kept + 1) * (1 + copied))))
    while batch > 0:
        try:
            return _measure(subject, plan, k, batch, ceilings)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            logger.warning("a batch of %d doesn't fit: %s", batch, str(error).strip().partition("\n")[0])
            batch -= math.ceil(batch * STEP_DOWN)
        free()
    raise RefragError(f"not even one request of {kept} positions fits; give a shorter --context")


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory is what an error comes from; the compiler wraps those of its own trials."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__
    return False


def _measure(subject: Subject, plan: ThroughputPlan, k: int | None, batch: int, ceilings: Ceilings) -> dict[str, Any]:
    """One row: the whole batch read and answered, some times over."""
    inputs, positions = _requests(subject, plan, k)
    runner = DecoderRunner(
        subject.decoder,
        max_positions=positions + plan.new_tokens,
        max_batch=batch,
        buckets_per_octave=BUCKETS_PER_OCTAVE,
    )

    def read() -> list[Tensor]:
        return [runner.prefill(inputs(), slot).argmax() for slot in range(batch)]

    def generate(first: Sequence[Tensor]) -> None:
        tokens = torch.stack(list(first))
        for step in range(1, plan.new_tokens):
            tokens = runner.decode(tokens, range(batch), [positions + step - 1] * batch).argmax(-1)

    cases = {"all": Case(lambda: generate(read())), "read": Case(read)}
    # What compiling leaves behind is given back before the next form is compiled.
    first = runner.prefill(inputs(), 0).argmax()
    free()
    runner.decode(first.expand(batch), range(batch), [positions] * batch)
    free()
    timed(cases["all"], subject.device)
    times = in_turns(cases, plan.runs, 0, subject.device)
    size, tokens = DecoderSize.of(subject.decoder), batch * plan.new_tokens
    reading = size.prefill(positions)
    if k:
        reading += projection_work(subject.at(k)[1], plan.context // k, size.number_bytes)
    # Read together, the prompts fetch the weights once.
    reading = Work(batch * reading.flops, reading.bytes + (batch - 1) * size.kv_bytes(positions))
    least = reading.seconds(ceilings.peak, ceilings.bandwidth) + sum(
        size.step(positions + step, batch).seconds(ceilings.peak, ceilings.bandwidth)
        for step in range(1, plan.new_tokens)
    )
    return {
        "system": "refrag" if k else "full",
        "k": k,
        "context": plan.context,
        "batch": batch,
        "tokens_per_second": round(tokens / times["all"].median, 2),
        "read_seconds": round(times["read"].median, 4),
        "seconds": round(times["all"].median, 4),
        "kv_bytes": batch * size.kv_bytes(positions + plan.new_tokens - 1),
        "limit": {"tokens_per_second": round(tokens / least, 2)},
        "runs": plan.runs,
        "spread": {"tokens_per_second": [round(tokens / value, 2) for value in reversed(times["all"].quartiles)]},
    }


def _requests(subject: Subject, plan: ThroughputPlan, k: int | None) -> tuple[Callable[[], Tensor], int]:
    """What makes one request's decoder input, and its length. All are alike, but none uses another's work."""
    generator = torch.Generator().manual_seed(plan.seed)
    embeddings: Any = subject.decoder.get_input_embeddings()
    tokens = torch.randint(embeddings.num_embeddings, (plan.context + plan.question,), generator=generator)
    tokens = tokens.to(subject.device)
    if k is None:
        return (lambda: embeddings(tokens)), len(tokens)
    encoder, projection = subject.at(k)
    chunks = plan.context // k
    vectors = torch.randn(chunks, encoder.vector_dim, generator=generator).to(subject.device, subject.dtype)
    question = tokens[plan.context :]
    return (lambda: torch.cat([projection(vectors), embeddings(question)])), chunks + plan.question


def _working_bytes(subject: Subject, positions: int) -> int:
    """About what reading a prompt takes besides keys and values; on a CPU it is little beside what is left free."""
    if subject.device.type != "cuda":
        return 0
    config = subject.decoder.config
    numbers = 3 * config.intermediate_size + 4 * config.hidden_size
    return WORKING_STATES * positions * numbers * subject.dtype.itemsize


def _free_bytes(device: torch.device) -> int:
    """Memory that keys and values may take; half of the host's, which kills instead of refusing."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
