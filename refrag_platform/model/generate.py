"""Token by token generation with a KV cache, for one prompt; `serving` and `evaluation` both use it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Prompt


@torch.inference_mode()
def generate(
    model: RefragModel,
    prompt: Prompt,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield the ids of new tokens one by one; a stop id ends the stream and is not yielded.

    The first token comes after one prefill over the compressed prompt. temperature 0 is greedy; otherwise
    tokens are drawn from the smallest set whose probability reaches top_p, with `generator`.
    """
    inputs = model.embed([prompt])
    output = model.decoder(inputs_embeds=inputs.embeds, use_cache=True, logits_to_keep=1)
    for made in range(1, max_new_tokens + 1):
        token = pick(output.logits[0, -1], temperature, top_p, generator)
        if token in stop_ids:
            return
        yield token
        if made == max_new_tokens:
            return
        output = model.decoder(
            input_ids=torch.tensor([[token]], device=model.device),
            past_key_values=output.past_key_values,
            use_cache=True,
        )


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """One token id from logits [vocabulary]."""
    if temperature <= 0:
        return int(logits.argmax())
    probabilities = (logits.float().cpu() / temperature).softmax(-1)
    ranked, order = probabilities.sort(descending=True)
    outside = ranked.cumsum(0) - ranked >= top_p
    ranked = ranked.masked_fill(outside, 0.0)
    return int(order[torch.multinomial(ranked, 1, generator=generator)])
