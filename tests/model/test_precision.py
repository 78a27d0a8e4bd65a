"""A CPU encodes in bfloat16 where that is faster, and in float32 elsewhere."""

import pytest
import torch

from refrag_platform.model import precision
from refrag_platform.model.precision import cpu_autocast, cpu_multiplies_bf16


@pytest.mark.parametrize(("able", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_encodes_in_what_it_can_multiply(monkeypatch: pytest.MonkeyPatch, able: bool, dtype: torch.dtype) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: able)
    with cpu_autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("kernels", "avx512", "avx512_bf16", "able"),
    [
        (True, True, True, True),
        (True, True, False, False),  # its kernels convert, and are slower than float32's
        (True, False, False, True),  # ARM
        (False, False, False, False),  # AVX2
    ],
)
def test_kernels_that_only_convert_do_not_count(
    monkeypatch: pytest.MonkeyPatch, kernels: bool, avx512: bool, avx512_bf16: bool, able: bool
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: kernels)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert cpu_multiplies_bf16.__wrapped__() == able
