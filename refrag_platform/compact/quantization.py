"""Matrices in few bits: every row has a scale, every entry one of 2^bits levels, evenly spaced and symmetric."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Level spacings tried, in units of a row's root mean square over the number of levels; the best is kept.
SPACINGS = torch.linspace(2.0, 8.0, 13).tolist()
# Times that levels and scale are fitted to each other: what was rounded once is found again as it is.
FITS = 4


@dataclass(frozen=True)
class Quantized:
    """codes: uint8 [rows, ceil(columns bits / 8)]; scale: float16 [rows]."""

    codes: Tensor
    scale: Tensor


def quantize(matrix: Tensor, bits: int) -> Quantized:
    """A matrix [rows, columns] in `bits` of 1 to 8: with 1, signs and a row's mean magnitude.

    An entry becomes scale x (code + 1/2). From each of several spacings of the levels on, and one that reaches the
    row's largest entry, the scale is fitted to the levels by least squares and these to the scale, in turn; a row keeps
    what has the smallest error.
    """
    matrix = matrix.float()
    half = 1 << (bits - 1)
    rms = matrix.pow(2).mean(1, keepdim=True).sqrt()
    best_codes, best_scale = torch.zeros_like(matrix), torch.zeros_like(rms)
    best_error = matrix.pow(2).sum(1, keepdim=True)
    starts = [rms * spacing / (2 * half) for spacing in SPACINGS]
    for scale in [*starts, matrix.abs().amax(1, keepdim=True) / half]:
        for _ in range(FITS):
            levels = (matrix / scale.clamp(min=1e-30)).floor().clamp(-half, half - 1) + 0.5
            scale = (matrix * levels).sum(1, keepdim=True) / levels.pow(2).sum(1, keepdim=True)
            scale = scale.half().float()
            error = (matrix - scale * levels).pow(2).sum(1, keepdim=True)
            better = error < best_error
            best_codes = torch.where(better, levels - 0.5, best_codes)
            best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    codes = (best_codes + half).to(torch.uint8).numpy()
    ordered = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(ordered.reshape(len(codes), -1), axis=1)
    return Quantized(torch.from_numpy(packed), best_scale[:, 0].half())


def dequantize(packed: Quantized, columns: int, bits: int) -> Tensor:
    """The matrix [rows, columns], float32."""
    half = 1 << (bits - 1)
    flat = np.unpackbits(packed.codes.numpy(), axis=1, count=columns * bits)
    codes = (flat.reshape(len(flat), columns, bits) << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.int64)
    levels = torch.from_numpy(codes).float() - half + 0.5
    return levels * packed.scale.float()[:, None]
