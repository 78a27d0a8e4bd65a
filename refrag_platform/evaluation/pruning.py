"""Self-information pruning: text shortened by leaving out the tokens that a decoder finds least surprising.

The idea of Selective Context (arXiv 2310.06201), token by token: what another compressor, without training, makes of
the same number of decoder tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refrag_platform.model.decoder import decoder_states, head_weight, token_losses
from refrag_platform.model.refrag import RefragModel


@torch.inference_mode()
def self_information(reader: RefragModel, passages: Sequence[Sequence[int]]) -> list[Tensor]:
    """Nats of each token of each passage, given those before it in the passage."""
    longest = max(map(len, passages), default=0)
    if not longest:
        return [torch.empty(0) for _ in passages]
    ids = torch.zeros(len(passages), longest + 1, dtype=torch.long)
    ids[:, 0] = reader.start_token_id
    for row, tokens in enumerate(passages):
        ids[row, 1 : len(tokens) + 1] = torch.as_tensor(tokens, dtype=torch.long)
    ids = ids.to(reader.device)
    # What pads a passage stands behind it, where its tokens can't see it.
    hidden = decoder_states(reader.decoder, reader.decoder.get_input_embeddings()(ids[:, :-1]))
    nats = token_losses(hidden.flatten(0, 1), head_weight(reader.decoder), ids[:, 1:].flatten())
    return [part[: len(tokens)].cpu() for part, tokens in zip(nats.view(len(passages), -1), passages, strict=True)]


def pruned(reader: RefragModel, passages: Sequence[Sequence[int]], tokens: int) -> list[int]:
    """The `tokens` tokens of most self-information of all the passages together, in their order."""
    whole = torch.tensor([token for passage in passages for token in passage], dtype=torch.long)
    if tokens >= len(whole):
        return whole.tolist()
    kept = torch.cat(self_information(reader, passages)).topk(tokens).indices.sort().values
    return whole[kept].tolist()
