"""The runner says what the decoder itself says, whatever is padded, cut, batched or graphed."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from refrag_platform.decoding import runner as module
from refrag_platform.decoding.runner import DecoderRunner, batch_bucket, bucket
from refrag_platform.errors import RefragError
from refrag_platform.model.refrag import RefragModel
from tests.decoding.conftest import plain_logits, random_embeds

Make = Callable[..., DecoderRunner]
# Rounding of logits up to 24; one position that is wrong or unseen changes them by a hundred times that and more.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.mark.parametrize("length", [1, 15, 16, 17, 70])
@pytest.mark.parametrize("slot", [0, 3])
def test_prefill_gives_the_decoder_s_own_logits(model: RefragModel, make_runner: Make, length: int, slot: int) -> None:
    runner, embeds = make_runner(), random_embeds(model, length)
    torch.testing.assert_close(runner.prefill(embeds, slot), plain_logits(model, embeds), **CLOSE)


@pytest.mark.parametrize("cuts", [(32,), (1, 2, 3), (40, 41), (60,)])
def test_a_prompt_may_be_read_in_pieces(model: RefragModel, make_runner: Make, cuts: tuple[int, ...]) -> None:
    runner, embeds = make_runner(), random_embeds(model, 61)
    for begin, end in zip((0, *cuts), (*cuts, 61), strict=True):
        logits = runner.prefill(embeds[begin:end], 2, begin)
    torch.testing.assert_close(logits, plain_logits(model, embeds), **CLOSE)


@pytest.mark.parametrize("last", [1, 20, 80])
def test_a_prompt_goes_on_in_the_only_slot_too(model: RefragModel, make_runner: Make, last: int) -> None:
    runner, embeds = make_runner(max_positions=151, max_batch=1), random_embeds(model, 70 + last)
    runner.prefill(random_embeds(model, 151, 5), 0)
    runner.prefill(embeds[:70], 0)
    torch.testing.assert_close(runner.prefill(embeds[70:], 0, 70), plain_logits(model, embeds), **CLOSE)


def test_padding_is_written_to_no_cell_that_is_read(model: RefragModel, make_runner: Make) -> None:
    """Neither in its own slot, up to the last position, nor in an idle one below it."""
    runner, embeds = make_runner(max_positions=70, max_batch=2), random_embeds(model, 70)
    runner.prefill(embeds[:69], 0)
    runner.prefill(embeds[:65], 1)
    runner.decode([3], [1], [65])
    runner.prefill(embeds[65:], 1, 65)
    torch.testing.assert_close(runner.decode([4], [0], [69])[0], plain_logits(model, embeds[:69], [4]), **CLOSE)
    torch.testing.assert_close(runner.prefill(embeds[69:], 1, 69), plain_logits(model, embeds), **CLOSE)


def test_tokens_follow_in_any_slots_of_any_lengths(model: RefragModel, make_runner: Make) -> None:
    runner = make_runner()
    prompts = {3: random_embeds(model, 50, 3), 0: random_embeds(model, 7, 1)}
    for slot, embeds in prompts.items():
        runner.prefill(embeds, slot)
    written: dict[int, list[int]] = {3: [], 0: []}
    for token in (5, 9, 2):
        positions = [len(prompts[slot]) + len(written[slot]) for slot in (3, 0)]
        logits = runner.decode([token, token + 1], [3, 0], positions)
        written[3].append(token)
        written[0].append(token + 1)
    for row, slot in zip(logits, (3, 0), strict=True):
        torch.testing.assert_close(row, plain_logits(model, prompts[slot], written[slot]), **CLOSE)


def test_a_slot_s_earlier_tenant_leaves_nothing(model: RefragModel, make_runner: Make) -> None:
    runner, embeds = make_runner(), random_embeds(model, 20, 1)
    runner.prefill(random_embeds(model, 120, 2), 1)
    runner.prefill(embeds, 1)
    torch.testing.assert_close(runner.decode([4], [1], [20])[0], plain_logits(model, embeds, [4]), **CLOSE)


def test_forms_that_were_dropped_are_made_again(
    model: RefragModel, make_runner: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_STEPS", 2)
    runner = make_runner()
    for length in (20, 70, 120, 20):
        embeds = random_embeds(model, length, length)
        torch.testing.assert_close(runner.prefill(embeds, 0), plain_logits(model, embeds), **CLOSE)
        torch.testing.assert_close(runner.decode([4], [0], [length])[0], plain_logits(model, embeds, [4]), **CLOSE)
    assert len(runner._steps) <= 2


def test_the_last_position_can_be_used(model: RefragModel, make_runner: Make) -> None:
    runner, embeds = make_runner(max_positions=70), random_embeds(model, 69)
    torch.testing.assert_close(runner.prefill(embeds, 0), plain_logits(model, embeds), **CLOSE)
    torch.testing.assert_close(runner.decode([4], [0], [69])[0], plain_logits(model, embeds, [4]), **CLOSE)


def test_what_does_not_fit_is_refused(model: RefragModel) -> None:
    runner = DecoderRunner(model.decoder, max_positions=32, max_batch=2)
    for length, slot, start in ((33, 0, 0), (0, 0, 0), (10, 2, 0), (10, 0, 25)):
        with pytest.raises(RefragError, match="2 slots of 32 positions"):
            runner.prefill(random_embeds(model, length), slot, start)
    for slots, positions in (([2], [0]), ([0], [32]), ([0, 0], [1, 2])):
        with pytest.raises(RefragError, match="2 slots of 32 positions"):
            runner.decode([1] * len(slots), slots, positions)


def test_the_decoder_keeps_its_attention_and_its_weights(model: RefragModel) -> None:
    before = dict(model.decoder.named_parameters())
    runner = DecoderRunner(model.decoder, max_positions=32)
    assert model.decoder.config._attn_implementation == "sdpa"
    twin = dict(runner._decoder.named_parameters())
    assert all(twin[name].data_ptr() == weight.data_ptr() for name, weight in before.items())


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_other_llama_types_work_too(kind: str, padded: bool) -> None:
    decoder = _random_decoder(kind, sliding_window=None)
    runner = DecoderRunner(decoder, max_positions=64, padded=padded, compile=False, cuda_graphs=False)
    embeds = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        own = decoder(inputs_embeds=embeds[None]).logits[0, -1]
    torch.testing.assert_close(runner.prefill(embeds, 0), own, **CLOSE)


def _random_decoder(kind: str, **config: object) -> torch.nn.Module:
    from transformers import CONFIG_MAPPING

    made: PretrainedConfig = CONFIG_MAPPING[kind](
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        **config,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(made).eval()


def test_buckets_hold_what_they_are_for() -> None:
    for per_octave in (8, 32):
        sizes = [bucket(length, per_octave) for length in range(1, 5000)]
        assert all(
            size >= length and size - length < max(16, length / per_octave) for length, size in enumerate(sizes, 1)
        )
        assert sizes == sorted(sizes)
    assert (bucket(1056, 32), bucket(544, 32)) == (1056, 544)
    assert [batch_bucket(batch) for batch in (1, 2, 3, 16, 17, 33)] == [1, 2, 4, 16, 32, 48]
