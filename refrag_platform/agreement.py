"""Whether a decoder, run as training and as the engine run it, says what it says by itself.

Training applies attention without masks, many windows in one sequence and the output matrix in blocks; the engine has a
cache and an attention of its own. A family that computes something else beside would be trained or served wrong without
a sign. So one short forward pass, before either begins, compares the logits with the decoder's own, as transformers
computes them with its plainest attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refrag_platform.decoding.runner import DecoderRunner
from refrag_platform.errors import RefragError
from refrag_platform.model.backbone import embedding_weight
from refrag_platform.model.decoder import decoder_states, head_weight
from refrag_platform.model.families import most_positions, refuse_unknown_layers, short_window
from refrag_platform.model.packed import packed_layout, predicting_states

# The probe: a context, blocks after it, and windows shorter than either, where the decoder has any.
CONTEXT, BLOCK, WINDOW = 6, 3, 4
POSITIONS = CONTEXT + BLOCK
# Largest difference, as a share of the largest logit: rounding is some hundred times less.
TOLERANCE = {torch.float32: 1e-3}
ROUGH_TOLERANCE = 0.05


def refuse_other_training(*modules: nn.Module) -> None:
    """Hold every decoder in these modules against itself as training runs it, and as the engine will.

    Raises:
        RefragError: the logits of a decoder's family differ, or it can't be run so.
    """
    for decoder in (model for module in modules for model in module.modules()):
        if isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None:
            with suppress(UnusableWeights):  # The loop says so, with the step.
                _refuse_other(decoder, "trained", (ENGINE, WHOLE, PACKED))


def refuse_other_serving(decoder: PreTrainedModel) -> None:
    """Hold a decoder, as the engine runs it, against itself.

    Raises:
        RefragError: its family's logits differ, or it can't be run so.
    """
    _refuse_other(decoder, "served", (ENGINE,))


class UnusableWeights(RefragError):
    """The decoder's own logits are no numbers."""


class _Way(NamedTuple):
    """A way of running a decoder on tokens [2, N]: its logits [n, vocabulary], and which of the decoder's own they are.

    expected: of the decoder's own logits [2, N, vocabulary], those that `run` must find.
    """

    name: str
    run: Callable[[PreTrainedModel, Tensor], Tensor]
    expected: Callable[[Tensor], Tensor]


def _whole(decoder: PreTrainedModel, token_ids: Tensor) -> Tensor:
    states = decoder_states(decoder, decoder.get_input_embeddings()(token_ids))
    return (states @ head_weight(decoder).t()).flatten(0, 1)


def _packed(decoder: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """One sequence: the second row's context, then the block of each row."""
    sequence = torch.cat([token_ids[1, :CONTEXT], token_ids[0, BLOCK : 2 * BLOCK], token_ids[1, CONTEXT:]])
    layout = packed_layout(torch.tensor([[BLOCK, CONTEXT]], device=token_ids.device), CONTEXT, BLOCK)
    states = decoder_states(decoder, decoder.get_input_embeddings()(sequence)[None], layout)
    return predicting_states(states, layout) @ head_weight(decoder).t()


def _engine(decoder: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """A prompt's beginning, the rest of it, and one token more."""
    runner = DecoderRunner(decoder, max_positions=POSITIONS, compile=False, cuda_graphs=False, padded=False)
    embeds = decoder.get_input_embeddings()(token_ids[0])
    begun, read = runner.prefill(embeds[:CONTEXT], 0), runner.prefill(embeds[CONTEXT:-1], 0, start=CONTEXT)
    return torch.stack([begun, read, runner.decode(token_ids[0, -1:], [0], [POSITIONS - 1])[0]])


WHOLE = _Way("in whole sequences", _whole, lambda logits: logits.flatten(0, 1))
PACKED = _Way(
    "in packed windows",
    _packed,
    lambda logits: torch.cat([logits[0, BLOCK - 1 : 2 * BLOCK - 1], logits[1, CONTEXT - 1 : POSITIONS - 1]]),
)
ENGINE = _Way("by the engine", _engine, lambda logits: logits[0, [CONTEXT - 1, POSITIONS - 2, POSITIONS - 1]])


@torch.no_grad()
def _refuse_other(decoder: PreTrainedModel, what: str, ways: Sequence[_Way]) -> None:
    name = f"{type(decoder).__name__} can't be {what}"
    refuse_unknown_layers(decoder)
    most = most_positions(decoder)
    if most is not None and most < POSITIONS:
        raise RefragError(f"{name}: it reads {most} positions (max_position_embeddings); {POSITIONS} are needed")
    vocabulary = embedding_weight(decoder).shape[0]
    # Anywhere in the vocabulary, and hardly one token twice.
    token_ids = (torch.arange(2 * POSITIONS, device=decoder.device) * 7919 % vocabulary).view(2, POSITIONS)
    # What stands before the first block stands before the second, too.
    token_ids[1, :BLOCK] = token_ids[0, :BLOCK]
    training = decoder.training
    decoder.eval()
    try:
        with short_window(decoder, WINDOW):
            reference = _own_logits(decoder, token_ids)
            if not bool(reference.isfinite().all()):
                raise UnusableWeights(f"{name}: its own logits are not finite; its weights are damaged")
            for way in ways:
                _compare(decoder, name, way, token_ids, reference)
    finally:
        decoder.train(training)


def _compare(decoder: PreTrainedModel, name: str, way: _Way, token_ids: Tensor, reference: Tensor) -> None:
    try:
        logits = way.run(decoder, token_ids).float()
    except (RuntimeError, TypeError, AttributeError, ValueError, KeyError, IndexError) as error:
        raise RefragError(
            f"{name}: its layers can't be run {way.name} ({error}); choose a decoder of another family"
        ) from error
    wanted = way.expected(reference)
    gap = float((logits - wanted).abs().max() / wanted.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
    # Written so that NaN is refused.
    if not gap <= TOLERANCE.get(decoder.dtype, ROUGH_TOLERANCE):
        raise RefragError(
            f"{name}: run {way.name}, its logits differ from its own by {gap:.2g} of the largest, so its family "
            "computes something that is not known here, capped logits or a bias of the head say; choose a decoder of "
            "another family"
        )


def _own_logits(decoder: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """The decoder's own logits, with the attention that transformers writes out: no kernel leaves a part undone."""
    config = decoder.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        return decoder(input_ids=token_ids, use_cache=False).logits.float()
    finally:
        config._attn_implementation = before
