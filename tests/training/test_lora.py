"""Low-rank updates of the decoder: what is trained, and what is left when they are merged."""

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import CptRecipe
from refrag_platform.training.core.lora import merge_lora, prepare_decoder, prepare_encoder
from tests.encoders import model_with


def _logits(model: RefragModel) -> torch.Tensor:
    with torch.no_grad():
        return model.decoder(input_ids=torch.arange(2, 34)[None]).logits


def _train(stack: nn.Module) -> None:
    for name, parameter in stack.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))


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
    _train(model.encoder)
    wanted = model.encode(chunks)
    merge_lora(model)
    assert list(model.encoder.state_dict()) == names
    torch.testing.assert_close(model.encode(chunks), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(RecipeError, match=r"encoder_lora_rank is 4: BertModel lacks"):
        prepare_encoder(model_with("chunk"), CptRecipe(steps=1, encoder_lora_rank=4), seed=0)


def test_merging_leaves_the_plain_decoder_with_the_same_logits(model: RefragModel) -> None:
    names, before = list(model.decoder.state_dict()), _logits(model)
    prepare_decoder(model, CptRecipe(steps=1, lora_rank=4), seed=0)
    _train(model.decoder)
    trained = _logits(model)
    assert not torch.allclose(trained, before, atol=1e-3)
    merge_lora(model)
    assert list(model.decoder.state_dict()) == names
    torch.testing.assert_close(_logits(model), trained, atol=1e-4, rtol=1e-4)


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
