"""The likeliest answer token by token, for one prompt: the plainest way, which evaluation scores.

`decoding` gives the same answers faster, for many at once; its tests hold it against this.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from inspect import signature

import torch
from transformers import Cache, DynamicCache, LlamaModel, PreTrainedModel

from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Prompt

# Renamed in transformers 5.24.
CACHE_ARGUMENT = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"


def empty_cache(decoder: PreTrainedModel) -> dict[str, Cache]:
    """A cache of keys and values as the decoder's named argument; each forward pass that is given it extends it."""
    return {CACHE_ARGUMENT: DynamicCache(config=decoder.config)}


@torch.inference_mode()
def generate(model: RefragModel, prompt: Prompt, max_new_tokens: int, stop_ids: Collection[int] = ()) -> Iterator[int]:
    """Yield the ids of new tokens one by one; a stop id ends the stream and is not yielded.

    The first token comes after one prefill over the compressed prompt.
    """
    inputs = model.embed([prompt])
    cache = empty_cache(model.decoder)
    output = model.decoder(inputs_embeds=inputs.embeds, use_cache=True, logits_to_keep=1, **cache)
    for count in range(1, max_new_tokens + 1):
        token = int(output.logits[0, -1].argmax())
        if token in stop_ids:
            return
        yield token
        if count == max_new_tokens:
            return
        output = model.decoder(input_ids=torch.tensor([[token]], device=model.device), use_cache=True, **cache)
