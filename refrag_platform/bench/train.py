"""Speed of continual pre-training: our loop beside a plain transformers loop, on the same batch, in one run.

Run: `refrag bench train --model smollm2-135m --json train.json`.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from refrag_platform.bench.arithmetic import Passes, StepWork, training_flops
from refrag_platform.bench.clock import synchronize
from refrag_platform.bench.gpus import stated_peak
from refrag_platform.bench.machine import free
from refrag_platform.model.backbone import embedding_weight
from refrag_platform.model.loading import default_device
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import CptRecipe
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.core.loop import train
from refrag_platform.training.core.metrics import memory_gb
from refrag_platform.training.core.precision import autocast
from refrag_platform.training.cpt import CptTask


class OneBatch(CptTask):
    """CPT on the same random tokens over and over, without the token before them: nothing but the loop is measured."""

    def batch(self, step: int, micro: int, size: int, rank: int, world: int) -> Batch:
        k, o = self.model.chunk_size, self.settings.output_tokens
        shape = (size // world, self.chunks * k + o)
        generator = torch.Generator().manual_seed(self.seed)
        tokens = torch.randint(0, embedding_weight(self.model.decoder).shape[0], shape, generator=generator)
        context = tokens[:, : self.chunks * k].reshape(-1, self.chunks, k)
        index = torch.arange(shape[0] * self.chunks).view(shape[0], self.chunks)
        return {
            "context": context,
            "output": tokens[:, self.chunks * k :],
            "token_ids": torch.zeros_like(index),
            "chunk_index": index,
        }


def bench_train(model: RefragModel, settings: CptRecipe, steps: int, warmup: int, seed: int = 0) -> dict[str, Any]:
    """Rows of both loops: {loop, positions_per_second, step_seconds, mfu, memory_gb, loss, ...}.

    Args:
        settings: context and output tokens, batch size and precision. Every weight trains, on single windows of full
            length, whatever the rest says.
        steps, warmup: measured steps, and steps before them (compilation).
    """
    settings = settings.model_copy(
        update={"curriculum": None, "mixed_steps_share": 0.0, "packed": False, "lora_rank": None}
    )
    device = default_device()
    plain_model = copy.deepcopy(model)
    ours = bench_loop(OneBatch(model, settings, {}, seed), settings, steps, warmup)
    flops = step_flops(model, settings)
    del model
    free()
    plain = bench_plain(OneBatch(plain_model, settings, {}, seed), settings, steps, min(3, warmup), device)
    rows = [{"loop": "refrag", **ours}, {"loop": "plain transformers", **plain}]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = stated_peak(name)
    for row in rows:
        row["mfu"] = None if peak is None else round(flops / row["step_seconds"] / peak, 4)
    return {
        "rows": rows,
        "device": name,
        "peak_flops": peak,
        "step_flops": flops,
        "torch": torch.__version__,
        "batch_size": settings.batch_size,
        "context_tokens": settings.context_tokens,
        "output_tokens": settings.output_tokens,
        "steps": steps,
        "seed": seed,
    }


def bench_loop(task: OneBatch, settings: CptRecipe, steps: int, warmup: int) -> dict[str, Any]:
    """Our own loop, as the stages run it."""
    clock: dict[int, float] = {}

    def on_step(step: int) -> None:
        if step in (warmup, warmup + steps):
            synchronize(default_device())
            clock[step] = time.perf_counter()

    # One step more, because the last one is logged and probed.
    update = {"steps": warmup + steps + 1, "log_every": 10**6, "save_every": 10**6, "compile": True}
    _reset_peak()
    with TemporaryDirectory() as work:
        begun = time.perf_counter()
        summary = train(task, settings.model_copy(update=update), Path(work), "bench: our loop", on_step=on_step)
    seconds = (clock[warmup + steps] - clock[warmup]) / steps
    return _row(task, settings, seconds, summary["first_loss"]) | {"warmup_seconds": round(clock[warmup] - begun, 1)}


def bench_plain(task: OneBatch, settings: CptRecipe, steps: int, warmup: int, device: torch.device) -> dict[str, Any]:
    """What one writes first: eager modules, labels given to the model, AdamW; micro-batches as memory allows."""
    micro = settings.batch_size
    while True:
        try:
            return _plain(task, settings, steps, warmup, device, micro)
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
        micro //= 2
        free()


def _plain(
    task: OneBatch, settings: CptRecipe, steps: int, warmup: int, device: torch.device, micro: int
) -> dict[str, Any]:
    model = task.model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.decoder_learning_rate)
    _reset_peak()
    loss, clock = torch.zeros(()), 0.0
    for step in range(warmup + steps):
        if step == warmup:
            synchronize(device)
            clock = time.perf_counter()
        batch = task.batch(0, 0, settings.batch_size, 0, 1)
        for start in range(0, settings.batch_size, micro):
            rows = slice(start, start + micro)
            loss = _plain_loss(model, batch["context"][rows].to(device), batch["output"][rows].to(device), settings)
            (loss * micro / settings.batch_size).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    synchronize(device)
    seconds = (time.perf_counter() - clock) / steps
    return _row(task, settings, seconds, float(loss.detach())) | {"micro_batch_size": micro}


def _plain_loss(model: RefragModel, context: Tensor, output: Tensor, settings: CptRecipe) -> Tensor:
    with autocast(settings.precision, context.device):
        chunks = model.project(model.encode(context))
        text = model.decoder.get_input_embeddings()(output)
        labels = torch.cat([output.new_full(context.shape[:2], -100), output], 1)
        inputs = torch.cat([chunks.to(text.dtype), text], 1)
        return model.decoder(inputs_embeds=inputs, labels=labels, use_cache=False).loss


def step_flops(model: RefragModel, settings: CptRecipe) -> float:
    """Multiplications and additions of one step, forward and backward: matrix products and attention, nothing else."""
    chunks = settings.context_tokens // model.chunk_size
    work = StepWork(settings.batch_size, chunks, chunks, chunks + settings.output_tokens, settings.output_tokens)
    return training_flops(model, work, Passes(3, 3, 3, 3))


def _row(task: CptTask, settings: CptRecipe, seconds: float, loss: float) -> dict[str, Any]:
    positions = settings.batch_size * (task.chunks + settings.output_tokens)
    return {
        "positions_per_second": round(positions / seconds),
        "step_seconds": round(seconds, 5),
        "memory_gb": round(memory_gb(), 2),
        "loss": round(loss, 4),
    }


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
