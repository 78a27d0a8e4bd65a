"""Low-rank updates of the decoder: what is trained, and what is left when they are merged."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import CptRecipe
from refrag_platform.training.core.lora import (
    add_lora,
    continue_lora,
    lora_state,
    merge_lora,
    prepare_decoder,
    prepare_encoder,
)
from tests.encoders import model_with


def _logits(model: RefragModel) -> torch.Tensor:
    with torch.no_grad():
        return model.decoder(input_ids=torch.arange(2, 34)[None]).logits


def _train(model: RefragModel) -> None:
    for name, tensor in lora_state(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.1, generator=torch.Generator().manual_seed(1))


def test_only_the_updates_of_linear_layers_are_trained(model: RefragModel) -> None:
    prepare_decoder(model, CptRecipe(steps=1, lora_rank=4), seed=0)
    trained = [name for name, parameter in model.decoder.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * model.decoder.config.num_hidden_layers


def test_an_encoder_that_copies_the_decoders_layers_trains_low_rank_updates() -> None:
    model = model_with("layers, passage")
    names, chunks = list(model.encoder.state_dict()), torch.arange(2, 34).view(8, 4)
    prepare_encoder(model, CptRecipe(steps=1, encoder_lora_rank=4), seed=0)
    trained = [name for name, parameter in model.encoder.backbone.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert model.encoder.pool.weight.requires_grad and model.decoder.get_input_embeddings().weight.requires_grad
    for name, parameter in model.encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    wanted = model.encode(chunks)
    merge_lora(model)
    assert list(model.encoder.state_dict()) == names
    torch.testing.assert_close(model.encode(chunks), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(RecipeError, match=r"encoder_lora_rank is 4: BertModel lacks"):
        prepare_encoder(model_with("chunk"), CptRecipe(steps=1, encoder_lora_rank=4), seed=0)


def test_merging_leaves_the_plain_decoder_with_the_same_logits(model: RefragModel) -> None:
    names, before = list(model.decoder.state_dict()), _logits(model)
    prepare_decoder(model, CptRecipe(steps=1, lora_rank=4), seed=0)
    _train(model)
    trained = _logits(model)
    assert not torch.allclose(trained, before, atol=1e-3)
    merge_lora(model)
    assert list(model.decoder.state_dict()) == names
    torch.testing.assert_close(_logits(model), trained, atol=1e-4, rtol=1e-4)


def test_a_training_goes_on_with_merged_updates_and_the_change_keeps_its_rank(model: RefragModel) -> None:
    name = "model.layers.0.mlp.up_proj"
    start = model.decoder.get_submodule(name).weight.detach().clone()
    prepare_decoder(model, CptRecipe(steps=1, lora_rank=4), seed=0)
    _train(model)
    updates = {key: tensor.clone() for key, tensor in lora_state(model).items()}
    merge_lora(model)
    before = _logits(model)
    prepare_decoder(model, CptRecipe(steps=1, lora_rank=4), seed=7)
    continue_lora(model, updates)
    torch.testing.assert_close(_logits(model), before, atol=1e-4, rtol=1e-4)
    for tensor in lora_state(model).values():
        tensor.add_(0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)))
    merge_lora(model)
    change = model.decoder.get_submodule(name).weight.detach() - start
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 4


def test_updates_that_are_added_to_where_they_started_give_the_trained_decoder(model: RefragModel) -> None:
    start = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
    prepare_decoder(model, CptRecipe(steps=1, lora_rank=4), seed=0)
    _train(model)
    updates = {key: tensor.clone() for key, tensor in lora_state(model).items()}
    merge_lora(model)
    trained = _logits(model)
    model.decoder.load_state_dict(start)
    assert not torch.allclose(_logits(model), trained, atol=1e-3)
    add_lora(model, updates)
    assert list(model.decoder.state_dict()) == list(start)
    torch.testing.assert_close(_logits(model), trained, atol=1e-4, rtol=1e-4)


def test_updates_of_another_rank_are_refused(model: RefragModel) -> None:
    prepare_decoder(model, CptRecipe(steps=1, lora_rank=4), seed=0)
    with pytest.raises(RefragError, match="same lora_rank"):
        continue_lora(model, {key: tensor[:1] for key, tensor in lora_state(model).items()})


def test_updates_on_top_of_updates_are_refused(model: RefragModel) -> None:
    prepare_decoder(model, CptRecipe(steps=1, lora_rank=4), seed=0)
    with pytest.raises(RefragError, match="has low-rank updates already"):
        prepare_decoder(model, CptRecipe(steps=1, lora_rank=4), seed=0)


def test_a_decoder_whose_layers_have_other_names_is_refused(model: RefragModel) -> None:
    model.decoder = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(RecipeError, match="lora_rank is 4: GPTNeoXForCausalLM lacks linear layers named down_proj"):
        prepare_decoder(model, CptRecipe(steps=1, lora_rank=4), seed=0)
