"""What all benchmarks have in common: how the machine is used, and what a result says of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from refrag_platform.bench.clock import Ceilings
from refrag_platform.bench.gpus import stated_peak
from refrag_platform.bench.shapes import Subject
from refrag_platform.bench.vectors import reads_chunks
from refrag_platform.model.decoder import UNPADDED_CHUNKS, attention
from refrag_platform.training.core.speed import fast_kernels

# On CUDA the runner pads to buckets: of 16 positions up to 2,048, of 128 from 8,192 on, so that little work is padding.
BUCKETS_PER_OCTAVE = 64


@contextmanager
def fast(subject: Subject) -> Iterator[None]:
    """On CUDA: the fastest attention for all systems, and the layers of an encoder of chunks compiled as the decoder's.

    One that reads passages runs as it is served.
    """
    on_cuda = subject.device.type == "cuda"
    by_chunk = on_cuda and reads_chunks(subject.encoder)
    if by_chunk:
        for module in subject.encoder.backbone.modules():
            if isinstance(module, torch.nn.ModuleList):
                for layer in module:
                    layer.compile(dynamic=False)
    config = subject.encoder.backbone.config
    with fast_kernels(on_gpu=on_cuda), attention(config, UNPADDED_CHUNKS) if by_chunk else nullcontext():
        yield


def measured_on(model: str, weights: str, decoder: PreTrainedModel, ceilings: Ceilings) -> dict[str, Any]:
    """What a result says of the model, where its weights come from, and the machine."""
    place = runs_on(decoder)
    return {
        "model": model,
        "weights": weights,
        **place,
        "peak_flops": ceilings.peak,
        "stated_peak_flops": stated_peak(place["device"]),
        "bandwidth": ceilings.bandwidth,
    }


def runs_on(decoder: PreTrainedModel) -> dict[str, str]:
    """The device, torch's version and the type of the weights."""
    on_cuda = decoder.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "dtype": str(decoder.dtype).removeprefix("torch."),
    }


def free() -> None:
    """Give unused device memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
