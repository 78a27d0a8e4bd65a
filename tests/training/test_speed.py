"""What makes training fast changes no result."""

from pathlib import Path

import pytest
import torch

from refrag_platform.model.decoder import CHUNKS, attention, decoder_states
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import read_recipe
from refrag_platform.training.core.speed import compile_regions, eager, fast_kernels
from tests.encoders import ENCODERS, model_with

RECIPE = Path(__file__).resolve().parents[2] / "models" / "tiny" / "recipe.yaml"


@pytest.fixture(scope="module")
def model() -> RefragModel:
    return RefragModel.create(read_recipe(RECIPE), RECIPE.parent)


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_fast_kernels_leave_what_an_encoder_reads(encoder: str) -> None:
    reader = model_with(encoder)
    passages = torch.randint(3, 900, (3, 20, reader.chunk_size), generator=torch.Generator().manual_seed(0))
    expected = reader.encode(passages, padded=False)
    passages[:, 15:] = -1
    partial = reader.encode(passages)
    with fast_kernels(reader, on_gpu=True):
        torch.testing.assert_close(reader.encode(passages)[:, :15], partial[:, :15], rtol=1e-4, atol=1e-4)
        passages = torch.randint(3, 900, (3, 20, reader.chunk_size), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(reader.encode(passages, padded=False), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_chunks_together_in_one_tile_see_only_themselves(model: RefragModel) -> None:
    chunks = torch.randint(0, 200, (64, model.chunk_size), generator=torch.Generator().manual_seed(0))
    expected = model.encode(chunks, padded=False)
    with attention(model.encoder.backbone.config, CHUNKS):
        together = model.encode(chunks, padded=False)
        other = chunks.clone()
        other[1:] = other[1:].flip(0)
        assert torch.allclose(model.encode(other, padded=False)[0], together[0], atol=1e-5)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    assert model.encoder.backbone.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_padded_chunks_keep_their_mask(model: RefragModel) -> None:
    chunks = torch.randint(0, 200, (64, model.chunk_size), generator=torch.Generator().manual_seed(1))
    chunks[-1, 2:] = -1
    expected = model.encode(chunks)
    with attention(model.encoder.backbone.config, CHUNKS):
        torch.testing.assert_close(model.encode(chunks), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoder_without_a_mask_reads_as_with_a_causal_one(model: RefragModel) -> None:
    inputs = torch.randn(2, 12, model.decoder.config.hidden_size, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 12, dtype=torch.long)
    expected = model.decoder.get_decoder()(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(decoder_states(model.decoder, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("few_shapes", [True, False])
def test_compiled_regions_leave_the_weights_names_alone(model: RefragModel, few_shapes: bool) -> None:
    names = list(model.state_dict())
    compile_regions(model, few_shapes=few_shapes)
    assert list(model.state_dict()) == names
    inputs = torch.randn(1, 8, model.decoder.config.hidden_size)
    with eager(), torch.no_grad():
        assert decoder_states(model.decoder, inputs).shape == inputs.shape
