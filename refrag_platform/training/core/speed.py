"""What makes training fast on a GPU without touching the models: fast kernels, and compiled regions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import nn

from refrag_platform.model.decoder import CHUNKS, attention, causal
from refrag_platform.model.encoder import BertEncoder, LayersEncoder


def compile_regions(*models: nn.Module, few_shapes: bool, backend: str = "inductor") -> None:
    """Compile the layers of every stack in place: one graph serves a whole stack, and shapes may change.

    Args:
        few_shapes: a graph of its own for each shape; else, once a second shape is met, one for any of them.
        backend: of torch.compile.
    """
    import torch._dynamo

    # A curriculum brings several shapes, probes bring passes without gradients.
    torch._dynamo.config.recompile_limit = 64
    for module in chain.from_iterable(model.modules() for model in models):
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1:
            for layer in module:
                layer.compile(dynamic=False if few_shapes else None, backend=backend)


@contextmanager
def fast_kernels(*models: nn.Module, on_gpu: bool) -> Iterator[None]:
    """The fastest attention for long sequences (cuDNN's) and for an encoder's windows, while a GPU trains."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with ExitStack() as stack:
        if on_gpu:
            order = [
                SDPBackend.CUDNN_ATTENTION,
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.MATH,
            ]
            stack.enter_context(sdpa_kernel(order, set_priority=True))
            for module in chain.from_iterable(model.modules() for model in models):
                if isinstance(module, BertEncoder):
                    stack.enter_context(attention(module.backbone.config, CHUNKS))
                elif isinstance(module, LayersEncoder):
                    longest = module.window_chunks * module.chunk_size
                    stack.enter_context(causal(module.backbone.config, longest))
        yield


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled regions as they were written."""
    with torch.compiler.set_stance("force_eager"):
        yield
