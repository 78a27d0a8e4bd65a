"""Several processes: which one this is, and the strategies that the loop supports."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.optim import Optimizer

from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.model.loading import default_device
from refrag_platform.recipes import TrainingRecipe
from refrag_platform.training.core.precision import computes_bf16

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.DEEPSPEED)


def world_size() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes the artifact."""
    return int(os.environ.get("RANK", "0")) == 0


def micro_batch(settings: TrainingRecipe, world: int) -> int:
    """Sequences of one forward pass over `world` processes.

    Raises:
        RefragError: the batch can't be cut so.
    """
    size = min(settings.batch_size, (settings.micro_batch_size or settings.batch_size // world) * world)
    if size < world or settings.batch_size % size:
        pieces = f"micro-batches of {settings.micro_batch_size}" if settings.micro_batch_size else "equal parts"
        raise RefragError(
            f"batch_size {settings.batch_size} can't be cut into {pieces} on {world} processes; make it a multiple of "
            f"{(settings.micro_batch_size or 1) * world}"
        )
    return size


def make_accelerator(
    settings: TrainingRecipe, micro_size: int, micro_steps: int, universal: bool = False
) -> Accelerator:
    """An Accelerator for these settings; the launcher's environment decides processes and strategy.

    Args: micro_size: sequences of one forward pass over all processes. universal: of DeepSpeed, a checkpoint for any
        number of processes is loaded.

    Raises:
        RecipeError: the strategy shards the weights, or the launcher's processes don't see each other.
    """
    world = world_size()
    # Buffers are constants here, and large ones: sending them again in every step would cost as much as the gradients.
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    # accelerate has to be told: ranks on CPUs would train alone, each on its own part of the data.
    on_cpus = world > 1 and not torch.cuda.is_available()
    if on_cpus:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        cpu=on_cpus and not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"),
        mixed_precision="bf16" if computes_bf16(settings.precision, default_device()) else "no",
        gradient_accumulation_steps=micro_steps,
        kwargs_handlers=handlers,
    )
    if accelerator.num_processes != world or accelerator.use_distributed != (world > 1):
        raise RecipeError(
            f"the launcher started {world} processes, accelerate sees {accelerator.num_processes} "
            f"({accelerator.distributed_type.value})"
        )
    plugin = accelerator.state.deepspeed_plugin
    # On CPUs accelerate would pass FSDP over and run DDP.
    kind = "FSDP" if parse_flag_from_env("ACCELERATE_USE_FSDP") else accelerator.distributed_type.value
    if kind not in SUPPORTED:
        raise RecipeError(
            f"{settings.accelerate_config}: {kind} is not supported, on CPUs or GPUs; use DDP, or DeepSpeed ZeRO "
            "stage 3 (../accelerate/zero3.yaml), which shards weights as FSDP does"
        )
    if plugin is not None:
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": micro_size // world,
            "gradient_accumulation_steps": micro_steps,
            "gradient_clipping": settings.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            # AdamW of PyTorch's steps where its state lies, on a CPU too.
            "zero_force_ds_cpu_optimizer": False,
            "checkpoint": {"load_universal": universal and plugin.zero_stage < 3},
        }
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds its part of the weights alone."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def prepare(accelerator: Accelerator, task: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
    """The task and its optimizer as the launcher's strategy runs them.

    A task that is not to be sharded must be on the device.
    """
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        for parameter in task.parameters():
            if parameter.dim() == 0:
                # DeepSpeed can't broadcast a number without a dimension; files with one load into either shape.
                parameter.data = parameter.data[None]
        for buffer in task.buffers():
            buffer.data = buffer.data.to(accelerator.device)
    return accelerator.prepare(task, optimizer)


def shares(counts: list[list[int]], accelerator: Accelerator) -> Tensor:
    """[micro-batches, parts]: by what each mean counts in the mean over them and all ranks; 1 where all are alike.

    So the loss, and its gradient, is that of the whole batch however it is cut.
    """
    # Numbers of the CPU multiply what is on a device, and a copy there would wait for it at every step.
    parts = torch.tensor(counts, dtype=torch.float32)
    total = parts.sum(0)
    if accelerator.num_processes > 1:
        parts = parts.to(accelerator.device, non_blocking=True)
        total = accelerator.reduce(parts.sum(0), "sum")
    return parts * (len(counts) * accelerator.num_processes) / total.clamp(min=1)


def refuse_other_weights(accelerator: Accelerator, task: nn.Module) -> None:
    """Compare what the ranks have trained, bit for bit; all of them call it.

    Raises:
        RefragError: they differ: a faulty device or network, or a rank that trained by itself.
    """
    if accelerator.num_processes == 1 or is_sharded(accelerator):
        return
    # Their bits as whole numbers: a sum of floats would be equal to some digits alone.
    whole = {2: torch.int16, 4: torch.int32}
    trained = [p.detach().reshape(-1) for p in task.parameters() if p.requires_grad]
    sums = torch.stack([values.view(whole[values.element_size()]).sum(dtype=torch.int64) for values in trained])
    every = accelerator.gather(sums[None])
    if odd := [rank for rank, one in enumerate(every) if not torch.equal(one, every[0])]:
        raise RefragError(
            f"the ranks' weights are no longer the same (rank 0's differ from those of {', '.join(map(str, odd))}): "
            "nothing is published; go back to an earlier checkpoint, and look at these ranks' devices"
        )


def gather_weights(accelerator: Accelerator, task: nn.Module, run: Any) -> None:
    """Give each process the whole of a sharded task's weights, on the CPU, and take DeepSpeed off it.

    What comes after the training, the merging of updates and the saving above all, is then that of any task.

    Args: run: the task as `prepare` returned it, which is of no use afterwards.
    """
    if not is_sharded(accelerator):
        return
    from deepspeed.runtime.zero import GatheredParameters

    whole: dict[int, nn.Parameter] = {}
    # One after the other: together they would not fit into the GPU.
    for parameter in task.parameters():
        with GatheredParameters([parameter]):
            whole[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", copy=True), parameter.requires_grad)
    run.destroy()
    for module in task.modules():
        parts = {name: part if part is None else whole[id(part)] for name, part in module._parameters.items()}
        module._parameters = parts
    task.to("cpu")
