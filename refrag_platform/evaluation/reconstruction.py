"""How much of the text the vectors carry: tokens recovered from chunks by the decoder (section 2).

Teacher-forced: each token given the vectors and the true tokens before it. Greedy: given the vectors alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refrag_platform.evaluation.metrics import rounded
from refrag_platform.model.decoder import decoder_states, head_weight
from refrag_platform.model.generate import empty_cache
from refrag_platform.model.refrag import RefragModel


@torch.inference_mode()
def reconstruction_accuracy(
    model: RefragModel, tokens: Tensor, greedy_rows: int, batch_size: int, repeat: bool = False
) -> dict[str, Any]:
    """Shares of tokens recovered, with the vectors of another sample beside them.

    Args:
        tokens: [n, f k], held-out text of f chunks a sample.
        greedy_rows: samples decoded greedily, 0 for none.
        repeat: the token that starts a text stands behind the vectors as well, which asks a model after `cpt` with
            repeat_steps_share for its context.
    """
    chunks = tokens.shape[1] // model.chunk_size
    own = shuffled = 0
    for rows, others in zip(tokens.split(batch_size), tokens.roll(1, 0).split(batch_size), strict=True):
        rows = rows.to(model.device)
        own += int((_predicted(model, _embeds(model, rows, repeat), rows) == rows).sum())
        wrong = _embeds(model, others.to(model.device), repeat)
        shuffled += int((_predicted(model, wrong, rows) == rows).sum())
    row: dict[str, Any] = {
        "chunks": chunks,
        "samples": len(tokens),
        "teacher_forced": rounded(own / tokens.numel()),
        "teacher_forced_shuffled": rounded(shuffled / tokens.numel()),
    }
    if greedy_rows:
        some = tokens[:greedy_rows].to(model.device)
        row["greedy_samples"] = len(some)
        row["greedy"] = rounded((_greedy(model, _embeds(model, some, repeat), some.shape[1]) == some).float().mean())
    return row


def _embeds(model: RefragModel, tokens: Tensor, repeat: bool) -> Tensor:
    """What the decoder reads for samples [n, f k]: [n, 1 + f, d], or [n, 1 + f + 1, d] to repeat."""
    embeds = model.project(model.encode(tokens.unflatten(1, (-1, model.chunk_size)), padded=False))
    start = model.decoder.get_input_embeddings()(torch.full_like(tokens[:, :1], model.start_token_id)).to(embeds.dtype)
    return torch.cat([start, embeds, start] if repeat else [start, embeds], 1)


def _predicted(model: RefragModel, embeds: Tensor, tokens: Tensor) -> Tensor:
    """The likeliest token [n, f k] at each place, given the true ones before it."""
    text = model.decoder.get_input_embeddings()(tokens[:, :-1])
    states = decoder_states(model.decoder, torch.cat([embeds.to(text.dtype), text], 1))[:, embeds.shape[1] - 1 :]
    weight = head_weight(model.decoder)
    return torch.cat([(block @ weight.t()).argmax(-1) for block in states.flatten(0, 1).split(4096)]).view(tokens.shape)


def _greedy(model: RefragModel, embeds: Tensor, length: int) -> Tensor:
    """The `length` tokens [n, length] that follow the vectors, each the likeliest."""
    cache = empty_cache(model.decoder)
    embeds = embeds.to(head_weight(model.decoder).dtype)
    output = model.decoder(inputs_embeds=embeds, use_cache=True, logits_to_keep=1, **cache)
    tokens = [output.logits[:, -1].argmax(-1)]
    while len(tokens) < length:
        output = model.decoder(input_ids=tokens[-1][:, None], use_cache=True, logits_to_keep=1, **cache)
        tokens.append(output.logits[:, -1].argmax(-1))
    return torch.stack(tokens, 1)
