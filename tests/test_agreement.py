"""A decoder says in training, in packed windows and in the engine what it says by itself, or is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from refrag_platform.agreement import refuse_other_serving, refuse_other_training
from refrag_platform.decoding.runner import DecoderRunner
from refrag_platform.errors import RefragError
from refrag_platform.model.backbone import embedding_size
from refrag_platform.model.decoder import decoder_states, head_weight
from refrag_platform.model.packed import packed_layout, predicting_states
from refrag_platform.recipes import DecoderRecipe
from refrag_platform.training.core.losses import linear_cross_entropy
from refrag_platform.weights import load_decoder
from tests.families import FAMILIES, VOCABULARY, WINDOWED, family, random_decoder

# Far more than a window; a context, and the blocks after it.
LENGTH, CONTEXT, BLOCK = 30, 20, 5
CLOSE: Any = {"rtol": 1e-3, "atol": 1e-4}


def tokens(rows: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def own_logits(decoder: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """[B, N, vocabulary] by the plainest attention."""
    decoder.config._attn_implementation = "eager"
    logits = decoder(input_ids=token_ids, use_cache=False).logits
    decoder.config._attn_implementation = "sdpa"
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_trained_as_it_is(name: str) -> None:
    decoder, token_ids = family(name), tokens(2)
    refuse_other_training(decoder)
    own = own_logits(decoder, token_ids)
    states = decoder_states(decoder, decoder.get_input_embeddings()(token_ids))
    torch.testing.assert_close(states @ head_weight(decoder).t(), own, **CLOSE)
    loss = linear_cross_entropy(states[:, :-1].flatten(0, 1), head_weight(decoder), token_ids[:, 1:].flatten())
    theirs = decoder(input_ids=token_ids, labels=token_ids, use_cache=False).loss
    torch.testing.assert_close(loss, theirs, **CLOSE)
    # The gradients, too, are the decoder's own.
    weight = next(parameter for name, parameter in decoder.named_parameters() if "layers.0" in name)
    (ours,), (wanted,) = torch.autograd.grad(loss, weight), torch.autograd.grad(theirs, weight)
    torch.testing.assert_close(ours, wanted, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_packed_windows_are_read_as_windows_one_by_one(name: str) -> None:
    decoder, (context, *blocks) = family(name), tokens()[0].split([CONTEXT, BLOCK, BLOCK])
    known = [10, CONTEXT]
    layout = packed_layout(torch.tensor([known]), CONTEXT, BLOCK)
    inputs = decoder.get_input_embeddings()(torch.cat([context, *blocks]))[None]
    found = predicting_states(decoder_states(decoder, inputs, layout), layout) @ head_weight(decoder).t()
    alone = [
        own_logits(decoder, torch.cat([context[:seen], block])[None])[0, seen - 1 : -1]
        for seen, block in zip(known, blocks, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_is_served_as_it_is(name: str, padded: bool) -> None:
    decoder, token_ids = family(name), tokens(2)
    refuse_other_serving(decoder)
    own = own_logits(decoder, token_ids)
    embeds = decoder.get_input_embeddings()(token_ids)
    runner = DecoderRunner(decoder, max_positions=100, max_batch=3, padded=padded)
    torch.testing.assert_close(runner.prefill(embeds[0, :20], 2), own[0, 19], **CLOSE)
    # It goes on in the slot; a prompt of one more token begins in another.
    torch.testing.assert_close(runner.prefill(embeds[0, 20:27], 2, start=20), own[0, 26], **CLOSE)
    torch.testing.assert_close(runner.prefill(embeds[1, :28], 0), own[1, 27], **CLOSE)
    for place in (27, 28):
        found = runner.decode([int(token_ids[0, place]), int(token_ids[1, place + 1])], [2, 0], [place, place + 1])
        torch.testing.assert_close(found, torch.stack([own[0, place], own[1, place + 1]]), **CLOSE)


@pytest.mark.parametrize("name", WINDOWED)
def test_the_probe_meets_a_window_that_is_longer_than_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = family(name, sliding_window=64)
    before = {module: getattr(module, "sliding_window", None) for module in decoder.modules()}
    refuse_other_training(decoder)
    assert decoder.config.sliding_window == 64
    assert {module: getattr(module, "sliding_window", None) for module in decoder.modules()} == before
    # A family whose window is not known of would be read without one.
    monkeypatch.setattr("refrag_platform.model.decoder.attention_window", lambda config: None)
    with pytest.raises(RefragError, match=rf"{type(decoder).__name__} can't be trained: run in whole sequences"):
        refuse_other_training(decoder)


class _Capped(LlamaForCausalLM):
    """A family that caps its logits, as Gemma-2 does."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = super().forward(*arguments, **named)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output


def _capped() -> PreTrainedModel:
    config: Any = random_decoder("LlamaConfig").config
    return _Capped(config)


def _biased() -> PreTrainedModel:
    decoder = random_decoder("PhiConfig")
    torch.nn.init.normal_(decoder.lm_head.bias)
    return decoder


def _of_chunks() -> PreTrainedModel:
    decoder = random_decoder("LlamaConfig")
    decoder.config.layer_types = ["full_attention", "chunked_attention"]
    return decoder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(_capped, "_Capped can't be trained: run in whole sequences, its logits differ", id="capped"),
        pytest.param(_biased, "PhiForCausalLM can't be trained: run in whole sequences.*bias", id="bias"),
        pytest.param(lambda: random_decoder("GPT2Config"), "GPT2LMHeadModel is of no Llama type", id="gpt2"),
        pytest.param(_of_chunks, "LlamaForCausalLM has layers of chunked_attention", id="chunks"),
        pytest.param(
            lambda: random_decoder("LlamaConfig", max_position_embeddings=8), "it reads 8 positions", id="short"
        ),
    ],
)
def test_what_is_computed_otherwise_is_refused_by_name(make: Any, said: str) -> None:
    decoder = make().train()
    with pytest.raises(RefragError, match=said):
        refuse_other_training(decoder)
    assert decoder.training and decoder.config._attn_implementation == "sdpa"


def test_what_cannot_be_served_is_refused_by_name() -> None:
    with pytest.raises(RefragError, match="OPTForCausalLM is of no Llama type"):
        refuse_other_serving(random_decoder("OPTConfig"))
    wrong = random_decoder("GPTNeoXConfig")  # its config has two heads of keys, its layers four
    with pytest.raises(RefragError, match="GPTNeoXForCausalLM can't be served: its layers can't be run by the engine"):
        refuse_other_serving(wrong)


def test_gemma2_is_refused_where_it_is_loaded(tmp_path: Path) -> None:
    kept = random_decoder("LlamaConfig")
    kept.save_pretrained(tmp_path / "decoder")
    config = tmp_path / "decoder" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"gemma2"').replace("LlamaFor", "Gemma2For"))
    with pytest.raises(RefragError, match=r"its attention is none that PyTorch computes.*Gemma2ForCausalLM"):
        load_decoder(DecoderRecipe(source="path:decoder"), tmp_path, seed=0)


def test_vectors_have_the_size_of_what_the_decoder_reads() -> None:
    for name in ("llama", "gemma3", "granite"):
        decoder = family(name)
        read = decoder.get_input_embeddings()(torch.arange(VOCABULARY))
        torch.testing.assert_close(embedding_size(decoder), read.pow(2).mean().sqrt().detach())
