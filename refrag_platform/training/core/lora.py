"""Low-rank updates of the decoder (LoRA, by peft): what a stage changes in it fits a few megabytes.

The decoder keeps its class and its names: updates are injected for the training and merged when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from refrag_platform.errors import RefragError
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import TrainsDecoder

# The update is scaled by this, whatever the rank, so that one learning rate suits all ranks.
SCALE = 2
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def prepare_decoder(model: RefragModel, settings: TrainsDecoder, seed: int) -> None:
    """Make the decoder trainable as the recipe's section says: all of it, or low-rank updates of its linear layers."""
    if settings.lora_rank is not None:
        _inject(model, settings.lora_rank, seed)


def _inject(model: RefragModel, rank: int, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, lora_dropout=0.0, target_modules=LINEAR_LAYERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model.decoder)
    for name, parameter in model.decoder.named_parameters():
        parameter.requires_grad_("lora_" in name)


def add_lora(model: RefragModel, updates: Mapping[str, Tensor]) -> None:
    """Merge updates (`lora_state` of a training's end) into the decoder that this training started from.

    Raises:
        RefragError: they are of other layers.
    """
    _inject(model, max((tensor.shape[0] for name, tensor in updates.items() if "lora_A" in name), default=1), seed=0)
    _set_updates(model, updates)
    merge_lora(model)


def continue_lora(model: RefragModel, updates: Mapping[str, Tensor]) -> None:
    """Go on with updates that an earlier training merged, instead of fresh ones on top: the rank stays what it was.

    Args: updates: `lora_state` of that training's end, in float32; `model` has been prepared for the same rank.

    Raises:
        RefragError: they are of another rank or other layers.
    """
    _set_updates(model, updates)
    from peft.tuners.lora import LoraLayer

    for module in model.decoder.modules():
        if isinstance(module, LoraLayer):
            # What is merged already must not count twice.
            layer: Any = module
            layer.get_base_layer().weight.data -= layer.get_delta_weight("default")


def _set_updates(model: RefragModel, updates: Mapping[str, Tensor]) -> None:
    own = lora_state(model)
    if {name: tensor.shape for name, tensor in own.items()} != {name: t.shape for name, t in updates.items()}:
        raise RefragError(
            "the low-rank updates are of another rank or other layers than the decoder's; set the same lora_rank"
        )
    for name, tensor in updates.items():
        own[name].copy_(tensor)


def lora_state(model: RefragModel) -> dict[str, Tensor]:
    """The tensors of the updates that are not merged yet; empty where there are none."""
    return {name: tensor.detach() for name, tensor in model.decoder.state_dict().items() if "lora_" in name}


def merge_lora(model: RefragModel) -> None:
    """Add the updates to the decoder's weights and take them out; nothing happens where there are none."""
    if not lora_state(model):
        return
    from peft.tuners.lora import LoraLayer

    for parent in list(model.decoder.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, LoraLayer):
                module.merge()
                setattr(parent, name, module.get_base_layer())
    # peft leaves it, and would take the next training's updates for a second set.
    del model.decoder.peft_config
