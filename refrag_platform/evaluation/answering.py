"""Greedy answers: one prompt at a time with its time to first token, or many at once for speed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from refrag_platform.model.generate import empty_cache, generate
from refrag_platform.model.prompts import rag_prompt, stop_ids
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Prompt, Text, prompt_length


@dataclass(frozen=True)
class TimedAnswer:
    """The text, and the time from prompt and chunk vectors to the first token; None where prompts share a batch."""

    text: str
    ttft_ms: float | None


def answers(
    reader: RefragModel, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int = 1
) -> Iterator[tuple[int, TimedAnswer]]:
    """The answer to each prompt with its number; in a batch, prompts of like length come together."""
    stops = stop_ids(reader.tokenizer)

    def text(ids: list[int]) -> str:
        return str(reader.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    if batch_size == 1:
        for number, prompt in enumerate(prompts):
            begun = time.perf_counter()
            stream = generate(reader, prompt, max_new_tokens, stops)
            first = next(stream, None)
            ttft = (time.perf_counter() - begun) * 1e3
            yield number, TimedAnswer(text([] if first is None else [first, *stream]), ttft)
        return
    order = sorted(range(len(prompts)), key=lambda number: prompt_length(prompts[number]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        generated = generate_batch(reader, [prompts[number] for number in numbers], max_new_tokens, stops)
        for number, ids in zip(numbers, generated, strict=True):
            yield number, TimedAnswer(text(ids), None)


@torch.inference_mode()
def generate_batch(
    reader: RefragModel, prompts: Sequence[Prompt], max_new_tokens: int, stops: Collection[int]
) -> list[list[int]]:
    """New token ids of each prompt, greedily, up to a stop id, which is left out."""
    inputs = reader.embed(prompts)
    mask, position = inputs.attention_mask.long(), inputs.position_ids[:, -1:]
    cache = empty_cache(reader.decoder)
    output = reader.decoder(
        inputs_embeds=inputs.embeds,
        attention_mask=mask,
        position_ids=inputs.position_ids,
        use_cache=True,
        logits_to_keep=1,
        **cache,
    )
    ends = torch.tensor(sorted(stops), device=reader.device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=reader.device)
    tokens = []
    for _ in range(max_new_tokens):
        token = output.logits[:, -1].argmax(-1)
        tokens.append(token)
        ended |= torch.isin(token, ends)
        if len(tokens) == max_new_tokens or bool(ended.all()):
            break
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), position + 1
        output = reader.decoder(
            input_ids=token[:, None], attention_mask=mask, position_ids=position, use_cache=True, **cache
        )
    return [list(takewhile(lambda token: token not in stops, ids)) for ids in torch.stack(tokens, 1).tolist()]


def warm_up(reader: RefragModel) -> None:
    """The first call of a process pays for allocations and kernels that later ones don't."""
    for _ in generate(reader, rag_prompt(reader.tokenizer, "?", [Text([0] * 64)]), 2):
        pass
