"""What a forward pass holds, in bytes, read off a pass over tensors that have shapes and no numbers.

What a backward pass would find is what autograd saves: of layers that are compiled, after the compiler has decided what
they keep and what they make again. Without a backward pass it is all that is alive at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refrag_platform.training.core.batch import Batch
from refrag_platform.training.core.speed import compile_regions, fast_kernels

# The compiler as for a GPU, up to what layers keep: without kernels.
PARTITIONED = "aot_eager_decomp_partition"


def numberless() -> FakeTensorMode:
    """The mode of such tensors; how many numbers a mask selects may stay open."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)


def compile_weightless(*modules: nn.Module) -> None:
    """Compile the layers as a GPU's training does."""
    compile_regions(*modules, few_shapes=True, backend=PARTITIONED)


def saved_bytes(
    forward: Callable[[Batch], Any], batch: Batch, modules: Sequence[nn.Module], mode: FakeTensorMode, bf16: bool
) -> int:
    """Bytes that a micro-batch leaves for its backward pass, the modules' own tensors aside."""
    constant = _constant(modules)
    saved: dict[int, UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _key(tensor) not in constant:
            # The storage is held, or its place would be another's.
            saved[_key(tensor)] = tensor.untyped_storage()
        return tensor

    with _as_on_a_gpu(modules, mode, bf16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(_fake(batch, mode))
    return sum(part.nbytes() for part in saved.values())


def peak_bytes(
    forward: Callable[[Batch], Any], batch: Batch, modules: Sequence[nn.Module], mode: FakeTensorMode, bf16: bool
) -> int:
    """Bytes of all that a pass without gradients makes and holds at once, at most, the modules' own aside."""
    with _as_on_a_gpu(modules, mode, bf16), torch.no_grad():
        inputs = _fake(batch, mode)
        with _Alive(_constant(modules)) as alive:
            forward(inputs)
    return alive.most


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors made since it was entered, views of constant ones aside; `most`: at once."""

    def __init__(self, constant: set[int]) -> None:
        super().__init__()
        self._sizes = dict.fromkeys(constant, 0)
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._sizes:
                storage = tensor.untyped_storage()
                self._sizes[_key(tensor)] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, _key(tensor))
        return output

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@contextmanager
def _as_on_a_gpu(modules: Sequence[nn.Module], mode: FakeTensorMode, bf16: bool) -> Iterator[None]:
    with mode, fast_kernels(*modules, on_gpu=True), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        yield


def _fake(batch: Batch, mode: FakeTensorMode) -> Batch:
    return {name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _constant(modules: Sequence[nn.Module]) -> set[int]:
    return {_key(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
