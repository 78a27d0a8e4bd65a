"""What training changed, tensor by tensor, in few bytes; the base's weights give the rest.

| keys | the tensor is |
| --- | --- |
| NAME:exact | as stored: norms, biases, whatever is small |
| NAME:codes-B, NAME:scale | quantized in B bits, instead of the base's |
| NAME:change-B, NAME:scale | the base's plus a change quantized in B bits |
| NAME:left-B, NAME:left_scale, NAME:right-B, NAME:right_scale | the base's plus left^T right, [r, out] and [r, in] |

With factors and a change, the change is what the factors leave.

A tensor without a key is the base's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from refrag_platform.compact.quantization import Quantized, dequantize, quantize

StateDict = Mapping[str, Tensor]
MIB = 1 << 20
# Tensors of fewer numbers are kept as they are.
SMALL = 4096


@dataclass(frozen=True)
class Coding:
    """How the large matrices of a part are written.

    bits: of every entry of the change, 0 = none. factor_bytes: what all low-rank factors may take together.
    factor_bits: of every entry of the factors.
    """

    bits: int
    factor_bytes: int = 0
    factor_bits: int = 8


def encode(base: StateDict, trained: StateDict, coding: Coding) -> dict[str, Tensor]:
    """The packed tensors of all that differs from the base, by more than bfloat16 shows."""
    changed = {name: tensor for name, tensor in trained.items() if not _same(tensor, base[name])}
    matrices = {name: tensor for name, tensor in changed.items() if tensor.dim() == 2 and tensor.numel() >= SMALL}
    packed = {f"{name}:exact": tensor.contiguous() for name, tensor in changed.items() if name not in matrices}
    factors = {}
    if coding.factor_bytes:
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
    """Factors of each change by its singular values; ranks are where a byte explains most of all changes together."""
    decompositions = {name: torch.linalg.svd(change, full_matrices=False) for name, change in changes.items()}
    ranks = _ranks({name: values for name, (_, values, _) in decompositions.items()}, changes, coding)
    packed = {}
    for name, rank in ranks.items():
        left, values, right = decompositions[name]
        root = values[:rank].sqrt()
        first = quantize((left[:, :rank] * root).t(), coding.factor_bits)
        second = quantize(root[:, None] * right[:rank], coding.factor_bits)
        packed[name] = {
            f"left-{coding.factor_bits}": first.codes,
            "left_scale": first.scale,
            f"right-{coding.factor_bits}": second.codes,
            "right_scale": second.scale,
        }
    return packed


def _ranks(spectra: StateDict, changes: StateDict, coding: Coding) -> dict[str, int]:
    """Singular values of all matrices, the most energy by byte first, until the bytes are spent; ranks above 0."""
    worth: list[tuple[float, float, str]] = []
    for name, values in spectra.items():
        cost = sum(changes[name].shape) * coding.factor_bits / 8 + 4
        worth += [(float(value) ** 2 / cost, cost, name) for value in values]
    ranks: dict[str, int] = defaultdict(int)
    left = float(coding.factor_bytes)
    for energy, cost, name in sorted(worth, reverse=True):
        if cost > left or energy == 0:
            break
        ranks[name] += 1
        left -= cost
    return ranks


def _by_name(packed: StateDict) -> dict[str, dict[str, Tensor]]:
    """Packed tensors by the name of what they give, then by kind."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in packed.items():
        name, _, kind = key.rpartition(":")
        parts[name][kind] = tensor
    return parts


def _factors(packed: StateDict, like: Tensor) -> tuple[Tensor, Tensor]:
    factors = []
    for side, columns in zip(("left", "right"), like.shape, strict=True):
        key = next(key for key in packed if key.startswith(f"{side}-"))
        factors.append(dequantize(Quantized(packed[key], packed[f"{side}_scale"]), columns, int(key.partition("-")[2])))
    return factors[0], factors[1]


def _product(packed: StateDict, like: Tensor) -> Tensor:
    """left^T right of packed factors, [out, in] like `like`."""
    left, right = _factors(packed, like)
    return left.t() @ right
