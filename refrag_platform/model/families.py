"""What a decoder's family does beside plain causal attention and one product with its output matrix.

Training and the engine run a decoder's layers in ways of their own; what they must know of the family is here. What
they don't know of is refused: `agreement.py` holds their logits against the decoder's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from refrag_platform.errors import RecipeError, RefragError

# Kinds of layers that are computed here, by their names in a config.
ATTENTION_KINDS = {"full_attention", "sliding_attention"}


def logits_scale(config: PretrainedConfig) -> float:
    """What the product of last hidden states and output matrix is multiplied by (Granite, Cohere); 1 for most."""
    if scaling := getattr(config, "logits_scaling", None):
        return 1 / float(scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)


def attention_window(config: PretrainedConfig) -> int | None:
    """Positions that the shortest-sighted layer reads, its own among them; None where every layer reads all."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if not getattr(config, "use_sliding_window", True) or (kinds and "sliding_attention" not in kinds):
        return None
    return getattr(config, "sliding_window", None) or None


def within_window(mask: Tensor, window: int) -> Tensor:
    """A mask [..., queries, keys] of what causal queries see, cut to the last `window` keys of each."""
    return mask & (mask.cumsum(-1) > mask.sum(-1, keepdim=True) - window)


def most_positions(decoder: PreTrainedModel) -> int | None:
    """Positions that the decoder was made for; None where its config names no limit."""
    return getattr(decoder.config.get_text_config(), "max_position_embeddings", None)


def require_positions(decoder: PreTrainedModel, needed: int, remedy: str) -> None:
    """Refuse sequences that are longer than the decoder was made for.

    Raises:
        RecipeError: it names both lengths and the `remedy`, the keys to change.
    """
    most = most_positions(decoder)
    if most is not None and needed > most:
        raise RecipeError(
            f"sequences of {needed:,} positions would be trained, but the decoder reads {most:,} "
            f"(max_position_embeddings); {remedy}"
        )


def refuse_unknown_layers(decoder: PreTrainedModel) -> None:
    """Refuse layers whose reach only a long sequence would show.

    Raises:
        RefragError: a layer's attention is neither full nor a sliding window.
    """
    kinds = set(getattr(decoder.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_KINDS
    if kinds:
        raise RefragError(
            f"{type(decoder).__name__} has layers of {', '.join(sorted(kinds))}, which neither training nor the engine "
            "computes; choose a decoder whose layers attend to all positions or to a sliding window"
        )


@contextmanager
def short_window(decoder: PreTrainedModel, window: int) -> Iterator[None]:
    """Sliding windows of a few positions while the context lasts: a short sequence meets them."""
    config: Any = decoder.config.get_text_config()
    if attention_window(config) is None:
        yield
        return
    changed = [config, *(module for module in decoder.modules() if getattr(module, "sliding_window", None))]
    before = [owner.sliding_window for owner in changed]
    try:
        for owner in changed:
            owner.sliding_window = window
        yield
    finally:
        for owner, size in zip(changed, before, strict=True):
            owner.sliding_window = size
