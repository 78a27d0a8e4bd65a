"""In what precision a CPU encodes passages."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import torch


def cpu_autocast() -> AbstractContextManager[None]:
    """Products of matrices in bfloat16 on a CPU that multiplies it, in half the time; what runs elsewhere stays as is.

    Only for what many tokens share: a decoder's step with few rows waits for the weights, not for products.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bf16())


@cache
def cpu_multiplies_bf16() -> bool:
    """Whether bfloat16 is faster than float32 on this machine's CPU."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    # For AVX-512 without bfloat16 oneDNN has kernels too; they convert, and take 2.6 times as long as float32's.
    return torch.cpu._is_avx512_bf16_supported() or not torch.cpu._is_avx512_supported()
