"""Low-rank updates (LoRA) of the decoder, and of an encoder that copies its layers: what changes fits a few megabytes.

Both keep their classes and names: updates are injected for the training and merged when it ends. A layer adds
its update to its weight before it multiplies, where other implementations multiply by three matrices. That has fewer
launches, which bound a small decoder's step, for a gradient of the weight's size, which a large decoder would feel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import TrainsDecoder, TrainsEncoder

# The update is scaled by this, whatever the rank, so that one learning rate suits all ranks.
SCALE = 2
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LowRankLinear(nn.Linear):
    """A linear layer whose weight is `weight + SCALE lora_B lora_A`; it takes over the layer's own tensors."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def update(self) -> Tensor:
        """The change of the weight, [out, in]."""
        return SCALE * (self.lora_B @ self.lora_A)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight + self.update(), self.bias)

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """A plain layer with the update in its weight."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.weight + self.update(), self.weight.requires_grad), self.bias
        return layer


def prepare_decoder(model: RefragModel, settings: TrainsDecoder, seed: int) -> None:
    """Make the decoder trainable as the recipe's section says: all of it, or low-rank updates of its linear layers.

    Raises:
        RecipeError: its layers have other names than a Llama's.
        RefragError: it has updates that are not merged yet.
    """
    if settings.lora_rank is not None:
        _inject(model.decoder, settings.lora_rank, seed, "lora_rank")


def prepare_encoder(model: RefragModel, settings: TrainsEncoder, seed: int) -> None:
    """Make the encoder trainable as the recipe's section says: all of it, or low-rank updates of its layers.

    Raises:
        RecipeError: its layers have other names than a Llama's.
        RefragError: it has updates that are not merged yet.
    """
    if settings.encoder_lora_rank is not None:
        _inject(model.encoder.backbone, settings.encoder_lora_rank, seed, "encoder_lora_rank")


def _inject(stack: nn.Module, rank: int, seed: int, key: str) -> None:
    """Args: key: of the recipe, for messages."""
    children = list(_children(stack))
    if any(isinstance(layer, LowRankLinear) for _, _, layer in children):
        raise RefragError(
            f"the {type(stack).__name__} has low-rank updates already; merge them (merge_lora) before others are "
            "injected"
        )
    layers = [(parent, name, layer) for parent, name, layer in children if name in LINEAR_LAYERS]
    if {name for _, name, _ in layers} != set(LINEAR_LAYERS):
        raise RecipeError(
            f"{key} is {rank}: {type(stack).__name__} lacks linear layers named "
            f"{', '.join(sorted(set(LINEAR_LAYERS) - {name for _, name, _ in layers}))}; leave {key} out"
        )
    stack.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parent, name, layer in layers:
            setattr(parent, name, LowRankLinear(layer, rank))


def _children(stack: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every linear layer of a stack, with its parent and its name there."""
    for parent in stack.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, name, child


def add_lora(model: RefragModel, updates: Mapping[str, Tensor]) -> None:
    """Merge updates (`lora_state` of a training's end) into the decoder that this training started from.

    Raises:
        RefragError: they are of other layers.
    """
    rank = max((tensor.shape[0] for name, tensor in updates.items() if "lora_A" in name), default=1)
    _inject(model.decoder, rank, 0, "lora_rank")
    _set_updates(model, updates)
    merge_lora(model)


def continue_lora(model: RefragModel, updates: Mapping[str, Tensor]) -> None:
    """Go on with updates that an earlier training merged, instead of fresh ones on top: the rank stays what it was.

    Args: updates: `lora_state` of that training's end, in float32; `model` has been prepared for the same rank.

    Raises:
        RefragError: they are of another rank or other layers.
    """
    _set_updates(model, updates)
    for _, _, layer in _children(model.decoder):
        if isinstance(layer, LowRankLinear):
            # What is merged already must not count twice.
            layer.weight.data -= layer.update().detach()


def _set_updates(model: RefragModel, updates: Mapping[str, Tensor]) -> None:
    current = lora_state(model)
    expected, shapes = ({name: tuple(t.shape) for name, t in state.items()} for state in (current, updates))
    if expected != shapes:
        name = min(name for name in expected | shapes if expected.get(name) != shapes.get(name))
        raise RefragError(
            f"the low-rank updates are not this decoder's: {name} is {shapes.get(name, 'missing')} where "
            f"{expected.get(name, 'nothing')} is expected; give those of the same decoder and set the same lora_rank"
        )
    for name, tensor in updates.items():
        current[name].copy_(tensor)


def lora_state(model: RefragModel) -> dict[str, Tensor]:
    """The tensors of the decoder's updates that are not merged yet; empty where there are none."""
    return {name: tensor.detach() for name, tensor in model.decoder.state_dict().items() if "lora_" in name}


def merge_lora(model: RefragModel) -> None:
    """Add all updates to the weights that they change, and take them out; nothing happens where there are none."""
    for parent, name, layer in list(_children(model)):
        if isinstance(layer, LowRankLinear):
            setattr(parent, name, layer.plain())
