"""Several continuations of one context, decoded at once: the context is read once, its keys and values are shared.

[context | prompt 1 | .. | prompt n | token 1 of each | token 2 of each | ..]: a row's context and all that continues it
have one cache, and by the mask a continuation sees the context and itself. The engine (`decoding`) has a slot for each
sequence, and reads prompts one by one, as requests come; here hundreds of contexts are read at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from refrag_platform.errors import RefragError
from refrag_platform.model.families import attention_window, logits_scale, most_positions
from refrag_platform.model.generate import CACHE_ARGUMENT

# Steps between two looks whether all continuations have ended: each look waits for the device.
STEPS_BETWEEN_LOOKS = 4


class Continuation(NamedTuple):
    """Token ids without the one that ends them, whether that came, and the mean log-probability of all of these."""

    token_ids: list[int]
    ended: bool
    log_probability: float


@torch.inference_mode()
def continuations(
    decoder: PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[Sequence[int]]],
    most_tokens: int,
    end_id: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[list[Continuation]]:
    """Continue each of B contexts after each of its prompts, as if every pair stood alone.

    Args:
        contexts: token ids, none of them empty. prompts: for each context token ids, some or none, none of them empty.
        most_tokens: of a continuation. temperature: 0 for the likeliest token; `generator` draws others.

    Raises:
        RefragError: the decoder can't read so many positions.
    """
    device, rows = decoder.device, len(contexts)
    count = max(map(len, prompts))
    texts, sizes = _padded(contexts, device)
    flat = [prompt for group in prompts for prompt in [*group, *[()] * (count - len(group))]]
    asked, lengths = _padded(flat, device, left=True)
    asked, lengths = asked.view(rows, count, -1), lengths.view(rows, count)
    context, width = texts.shape[1], asked.shape[2]
    _require_reach(decoder, context + width + most_tokens)

    body, head, scale = decoder.get_decoder(), decoder.get_output_embeddings(), logits_scale(decoder.config)
    # Without the decoder's config: its cache would forget what lies behind a layer's window.
    cache = {CACHE_ARGUMENT: DynamicCache(), "use_cache": True}
    body(input_ids=texts, **cache)

    known = (torch.arange(context, device=device) < sizes[:, None])[:, None]  # [B, 1, C]
    real = torch.arange(width, device=device) >= width - lengths[..., None]  # [B, n, m]
    same_prompt = torch.eye(count, dtype=torch.bool, device=device)
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    block = (same_prompt[:, None, :, None] & causal[None, :, None]).view(count * width, -1) & real.view(rows, 1, -1)
    # Padding sees itself: a softmax over nothing is no number.
    block |= torch.eye(count * width, dtype=torch.bool, device=device)
    mask = torch.cat([known.expand(-1, count * width, -1), block], 2)
    positions = (sizes[:, None, None] + real.cumsum(2) - 1).clamp(min=0)
    states = body(
        input_ids=asked.flatten(1), position_ids=positions.flatten(1), attention_mask=mask[:, None], **cache
    ).last_hidden_state
    states, positions = states.view(rows, count, width, -1)[:, :, -1], positions[:, :, -1]
    seen = torch.cat([known.expand(-1, count, -1), (same_prompt[..., None] & real[:, None]).flatten(2)], 2)

    done = lengths == 0
    tokens: list[Tensor] = []
    scores: list[Tensor] = []
    for step in range(1, most_tokens + 1):
        logits = head(states).float() * scale
        drawn = _draw(logits, temperature, generator).masked_fill(done, end_id)
        tokens.append(drawn)
        scores.append(logits.log_softmax(-1).gather(2, drawn[..., None])[..., 0])
        done = done | (drawn == end_id)
        if step == most_tokens or (step % STEPS_BETWEEN_LOOKS == 0 and bool(done.all())):
            break
        positions, seen = positions + 1, torch.cat([seen, same_prompt.expand(rows, -1, -1)], 2)
        states = body(input_ids=drawn, position_ids=positions, attention_mask=seen[:, None], **cache).last_hidden_state
    ids, values = torch.stack(tokens, 2).tolist(), torch.stack(scores, 2).tolist()
    return [
        [_ended(ids[row][number], values[row][number], end_id) for number in range(len(own_prompts))]
        for row, own_prompts in enumerate(prompts)
    ]


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A token for each of the logits [B, n, vocabulary]."""
    if not temperature:
        return logits.argmax(-1)
    shares = (logits / temperature).softmax(-1)
    return torch.multinomial(shares.flatten(0, 1), 1, generator=generator).view(shares.shape[:2])


def _ended(ids: list[int], scores: list[float], end_id: int) -> Continuation:
    size = ids.index(end_id) if end_id in ids else len(ids)
    counted = scores[: size + 1]
    return Continuation(ids[:size], size < len(ids), sum(counted) / len(counted))


def _padded(lists: Sequence[Sequence[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [n, longest], padded with 0 on the right or left, and their lengths [n]."""
    longest = max(map(len, lists))
    rows = [([0] * (longest - len(tokens)), list(tokens)) for tokens in lists]
    ids = [padding + tokens if left else tokens + padding for padding, tokens in rows]
    return torch.tensor(ids, device=device), torch.tensor([len(tokens) for tokens in lists], device=device)


def _require_reach(decoder: PreTrainedModel, positions: int) -> None:
    limits = [limit for limit in (attention_window(decoder.config), most_positions(decoder)) if limit is not None]
    if limits and positions > min(limits):
        raise RefragError(
            f"{type(decoder).__name__} reads {min(limits):,} positions at most, and a passage with what is asked about "
            f"it takes up to {positions:,}; choose a decoder that reads more"
        )
