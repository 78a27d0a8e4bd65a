"""What training changed, tensor by tensor, in few bytes; the base's weights give the rest.

| keys | the tensor is |
| --- | --- |
| NAME:exact | as stored: norms, biases, whatever is small |
| NAME:codes-B, NAME:scale | quantized in B bits, instead of the base's |
| NAME:change-B, NAME:scale | the base's plus a change quantized in B bits |
| NAME:left-B, NAME:left_scale, NAME:right-B, NAME:right_scale | the base's plus left^T right, [r, out] and [r, in] |

Rows of the factors stand in the order of their singular values, the largest first; there is a left-B and a right-B for
each number of bits B that rows of this tensor have, the first of them the most, and one scale a row. With factors and a
change, the change is what the factors leave.

A tensor without a key is the base's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refrag_platform.compact.quantization import Quantized, dequantize, quantize

StateDict = Mapping[str, Tensor]
MIB = 1 << 20
# Tensors of fewer numbers are kept as they are.
SMALL = 4096
# What a row of a factor may have of bits, and its mean squared error in that of a normal distribution's entries, with
# evenly spaced levels (Max 1960, table II).
ERRORS = {0: 1.0, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.003495, 6: 0.001041, 8: 0.0000873}
SCALE_BYTES = 2


@dataclass(frozen=True)
class Coding:
    """How the large matrices of a part are written.

    bits: of every entry of the change, 0 = none. factor_bytes: what all low-rank factors may take together.
    """

    bits: int
    factor_bytes: int = 0


def encode(base: StateDict, trained: StateDict, coding: Coding) -> dict[str, Tensor]:
    """The packed tensors of all that differs from the base, by more than bfloat16 shows."""
    changed = {name: tensor for name, tensor in trained.items() if not _same(tensor, base[name])}
    matrices = {name: tensor for name, tensor in changed.items() if tensor.dim() == 2 and tensor.numel() >= SMALL}
    packed = {f"{name}:exact": tensor.contiguous() for name, tensor in changed.items() if name not in matrices}
    factors = {}
    if coding.factor_bytes and matrices:
        factors = _low_rank({name: tensor.float() - base[name].float() for name, tensor in matrices.items()}, coding)
    for name, tensor in matrices.items():
        start, kind = base[name].float(), "change"
        if name in factors:
            packed |= {f"{name}:{key}": value for key, value in factors[name].items()}
            start = start + _product(factors[name], tensor)
        elif (tensor.float() - start).norm() > tensor.float().norm():
            # What started at random, or at nothing, is smaller than its change.
            start, kind = torch.zeros_like(start), "codes"
        if coding.bits:
            quantized = quantize(tensor.float() - start, coding.bits)
            packed |= {f"{name}:{kind}-{coding.bits}": quantized.codes, f"{name}:scale": quantized.scale}
    return packed


def decode(base: StateDict, packed: StateDict) -> dict[str, Tensor]:
    """The whole state again: the base's, changed by what `encode` packed.

    Raises:
        KeyError: the packed tensors are of another model.
    """
    state = dict(base)
    for name, parts in _by_name(packed).items():
        value = base[name].float()
        if any(kind.startswith("left") for kind in parts):
            value = value + _product(parts, base[name])
        for kind, tensor in parts.items():
            what, _, bits = kind.partition("-")
            if what == "exact":
                value = tensor.float()
            elif what in {"change", "codes"}:
                unpacked = dequantize(Quantized(tensor, parts["scale"]), base[name].shape[1], int(bits))
                value = unpacked + (value if what == "change" else 0)
        state[name] = value
    return state


def relative_error(base: StateDict, trained: StateDict, decoded: StateDict) -> float:
    """Size of what `decoded` misses of the change from base to trained, by the change's size, all tensors together."""
    missed = sum(float((trained[name].float() - decoded[name].float()).pow(2).sum()) for name in trained)
    change = sum(float((trained[name].float() - base[name].float()).pow(2).sum()) for name in trained)
    return (missed / change) ** 0.5 if change else 0.0


def _same(tensor: Tensor, base: Tensor) -> bool:
    # A trained folder may have been saved in bfloat16: compare with what that makes of the base.
    return torch.equal(tensor.to(torch.bfloat16), base.to(torch.bfloat16))


def _low_rank(changes: StateDict, coding: Coding) -> dict[str, dict[str, Tensor]]:
    """Factors of each change by its singular values; ranks and bits are where a byte explains most of all changes."""
    decompositions = {name: torch.linalg.svd(change, full_matrices=False) for name, change in changes.items()}
    spectra = {name: values for name, (_, values, _) in decompositions.items()}
    packed = {}
    for name, bits in _bits_by_rank(spectra, changes, coding.factor_bytes).items():
        left, values, right = decompositions[name]
        rank = int((bits > 0).sum())
        root = values[:rank].sqrt()
        sides = {"left": (left[:, :rank] * root).t(), "right": root[:, None] * right[:rank]}
        if rank:
            packed[name] = {key: part for side in sides.items() for key, part in _factor(*side, bits[:rank]).items()}
    return packed


def _factor(side: str, rows: Tensor, bits: NDArray[np.int64]) -> dict[str, Tensor]:
    """A factor [r, columns] whose rows have these bits [r], the most first."""
    coded = {int(some): quantize(rows[torch.from_numpy(bits == some)], int(some)) for some in np.unique(bits)[::-1]}
    scales = torch.cat([quantized.scale for quantized in coded.values()])
    return {f"{side}-{some}": quantized.codes for some, quantized in coded.items()} | {f"{side}_scale": scales}


def _bits_by_rank(spectra: StateDict, changes: StateDict, factor_bytes: int) -> dict[str, NDArray[np.int64]]:
    """Bits of both factors' rows, by matrix, for all its singular values; 0 of those that are left out.

    A product of rows of which each misses the share e of its energy misses 2 e + e^2. Bits are given one step after the
    other where a byte saves most, until the bytes are spent.
    """
    choices, missed = np.array(list(ERRORS)), np.array(list(ERRORS.values()))
    saved = -np.diff(np.minimum(2 * missed + missed**2, 1.0))
    widths = np.concatenate([np.full(len(values), sum(changes[name].shape)) for name, values in spectra.items()])
    cost = widths[:, None] * np.diff(choices) / 8
    cost[:, 0] += 2 * SCALE_BYTES
    energy = np.concatenate([values.double().numpy() ** 2 for values in spectra.values()])
    worth = (energy[:, None] * saved / cost).ravel()
    order = np.argsort(-worth, kind="stable")
    taken = np.zeros(len(worth), bool)
    taken[order] = (np.cumsum(cost.ravel()[order]) <= factor_bytes) & (worth[order] > 0)
    bits = choices[taken.reshape(cost.shape).sum(1)]
    ends = np.cumsum([len(values) for values in spectra.values()])[:-1]
    return dict(zip(spectra, np.split(bits, ends), strict=True))


def _by_name(packed: StateDict) -> dict[str, dict[str, Tensor]]:
    """Packed tensors by the name of what they give, then by kind."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in packed.items():
        name, _, kind = key.rpartition(":")
        parts[name][kind] = tensor
    return parts


def _rows(packed: StateDict, side: str, columns: int) -> Tensor:
    """A factor [r, columns]."""
    bits = sorted((int(key.partition("-")[2]) for key in packed if key.startswith(f"{side}-")), reverse=True)
    codes = [packed[f"{side}-{some}"] for some in bits]
    scales = packed[f"{side}_scale"].split([len(part) for part in codes])
    coded = zip(codes, scales, bits, strict=True)
    return torch.cat([dequantize(Quantized(part, scale), columns, some) for part, scale, some in coded])


def _product(packed: StateDict, like: Tensor) -> Tensor:
    """left^T right of packed factors, [out, in] like `like`."""
    left, right = (_rows(packed, side, columns) for side, columns in zip(("left", "right"), like.shape, strict=True))
    return left.t() @ right
