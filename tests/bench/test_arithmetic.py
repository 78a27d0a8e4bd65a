"""Formulas and limits against numbers worked out by hand."""

import pytest
import torch

from refrag_platform.bench.arithmetic import DecoderSize, PaperFormula, Work, encoder_work
from refrag_platform.bench.shapes import SHAPES, named_shape
from refrag_platform.errors import RefragError
from refrag_platform.model.backbone import embedding_weight, first_layers, strip_backbone
from refrag_platform.model.encoder import LayersEncoder

LLAMA = DecoderSize(
    width=4096,
    layers=32,
    parameters=6_738_415_616,
    body=6_476_005_376,
    head=131_072_000,
    attention_width=4096,
    kv_width=4096,
    number_bytes=2,
)
SMOL = DecoderSize(576, 30, 134_515_008, 106_168_320, 28_311_552, 576, 192, 2)


def test_papers_time_to_first_token() -> None:
    # (24 * 4096^2 + 4 * 4096 * 16384) * 32 * 16384 = 351,843,720,888,320 operations.
    formula = PaperFormula(LLAMA)
    assert formula.ttft(16384, peak=1e15) == pytest.approx(0.35184372088832)
    # With s / 16 = 1024: (402,653,184 + 16,777,216) * 32 * 1024.
    assert formula.ttft(1024, peak=1e15) == pytest.approx(0.0137438953472)


def test_papers_speed_up_is_the_ratio_of_its_times() -> None:
    formula = PaperFormula(LLAMA)
    assert formula.ttft_speedup(16384, 16) == pytest.approx(25.6)
    assert formula.ttft(16384, 1.0) / formula.ttft(1024, 1.0) == pytest.approx(25.6)
    assert formula.ttft_speedup(16384, 1) == 1


def test_papers_cache_and_time_per_token() -> None:
    formula = PaperFormula(LLAMA)
    # 4 * 4096 * 32 = 524,288 bytes a position.
    assert formula.kv_bytes(16384, 32) == 524_288 * 16_416 == LLAMA.kv_bytes(16_416)
    assert formula.kv_bytes(1024, 32) == 553_648_128
    assert formula.ttit(1024, 32, bandwidth=1e12) == pytest.approx((2 * 6_738_415_616 + 553_648_128) / 1e12)


def test_grouped_query_attention_shrinks_the_cache_by_the_ratio_of_the_heads() -> None:
    # 4 * 576 * 30 * 4128 / 3
    assert PaperFormula(SMOL).kv_bytes(4096, 32) == pytest.approx(95_109_120) == SMOL.kv_bytes(4128)


def test_limit_is_the_longer_of_arithmetic_and_memory() -> None:
    assert Work(flops=10, bytes=1).seconds(peak=5, bandwidth=1) == 2
    assert Work(flops=1, bytes=10).seconds(peak=5, bandwidth=2) == 5
    # Planning's figure: about 18 ms at k = 16 on a device of 790 TFLOP/s.
    assert LLAMA.prefill(1056).seconds(790e12, 3e12) == pytest.approx(0.0177, abs=5e-4)


def test_dimensions_are_read_off_the_decoder() -> None:
    subject = named_shape("tiny", torch.device("cpu"), torch.float32)
    size = DecoderSize.of(subject.decoder)
    # A layer: 64 x 64 twice, 64 x 32 twice, 64 x 128 three times.
    assert (size.body, size.head, size.kv_width) == (2 * 36_864, 64_000, 32)
    assert size.prefill(3).flops == 2 * (73_728 * 3 + 64_000) + 4 * 2 * 64 * (1 + 2 + 3)
    assert size.prefill(2, start=5).flops == 2 * (73_728 * 2 + 64_000) + 4 * 2 * 64 * (6 + 7)
    assert size.step(7).flops == size.prefill(1, start=6).flops
    # Encoder layer: 32 x 32 four times, 32 x 64 twice; adapter 64 x 32; pool 4 * 32 x 64, skip 4 * 64 x 64.
    assert encoder_work(subject.encoder, 5, 4).flops == 2 * (5 * 4 * (8_192 + 2_048) + 5 * 24_576) + 4 * 32 * 5 * 16


def test_where_the_first_position_is_pooled_the_last_layer_computes_no_other() -> None:
    subject = named_shape("tiny", torch.device("cpu"), torch.float32)
    encoder = subject.encoder
    encoder.pooling = "cls"
    # Of the one layer, 2 x 1,024 weights for keys and values of every token, the others' 6,144 once a chunk.
    assert encoder_work(encoder, 5, 4).flops == 2 * (20 * (2_048 + 2_048) + 5 * (6_144 + 24_576)) + 4 * 32 * 5 * 4


def test_a_copy_of_layers_reads_windows_of_a_passage_each_token_after_those_before_it() -> None:
    decoder = named_shape("tiny", torch.device("cpu"), torch.float32).decoder
    layers = strip_backbone(first_layers(decoder, 1))
    encoder = LayersEncoder(layers, embedding_weight(decoder).detach(), 1.0, 4, "concat", True, window_chunks=8)
    # A layer: 36,864; pool 4 * 64 x 64, skip the same. Passages of 12 chunks are two windows of 24 tokens.
    attention = 4 * 64 * 96 * 25 / 2
    assert encoder_work(encoder, 24, 4, passage=12).flops == 2 * (96 * 36_864 + 24 * 32_768) + attention


def test_shapes_have_the_parameters_of_their_namesakes() -> None:
    with torch.device("meta"):
        from transformers import LlamaConfig, LlamaForCausalLM

        counted = {
            name: sum(tensor.numel() for tensor in LlamaForCausalLM(LlamaConfig(**shape.decoder)).parameters())
            for name, shape in SHAPES.items()
        }
    assert counted["llama-2-7b"] == LLAMA.parameters
    assert counted["smollm2-135m"] == SMOL.parameters


def test_unknown_shape_names_the_known_ones() -> None:
    with pytest.raises(RefragError, match="no shape 'llama'; there are llama-2-7b, smollm2-135m, tiny"):
        named_shape("llama", torch.device("cpu"), torch.float32)
