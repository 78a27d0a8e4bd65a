"""Runs a decoder against a cache with slots: prefill of one sequence, one step of many.

    runner = DecoderRunner(decoder, max_positions=4096, max_batch=8)
    logits = runner.prefill(embeds, slot=0)                                   # embeds [N, d] -> [vocabulary]
    logits = runner.decode([int(logits.argmax())], slots=[0], positions=[N])  # -> [1, vocabulary]

On CUDA, shapes are padded to buckets, each bucket's step is compiled and captured as a CUDA graph at its first use
(`warm_up` does it ahead), and a call is one replay. On a CPU nothing is padded: every row is computed as it stands.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refrag_platform.decoding.cache import ATTENTION, SlotCache, Step
from refrag_platform.decoding.graphs import GraphedStep
from refrag_platform.errors import RefragError

SMALLEST_BUCKET, LARGEST_UNIT = 16, 128
REACHES_PER_OCTAVE = 4
# Forms that are kept captured: each holds memory of the device.
MOST_STEPS = 256


class DecoderRunner:
    """A decoder of any Llama type, with a cache of `max_batch` slots of `max_positions` positions.

    Weights are shared with the decoder, which stays as it is. Not for two threads at once.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        *,
        max_positions: int,
        max_batch: int = 1,
        compile: bool | None = None,
        cuda_graphs: bool | None = None,
        padded: bool | None = None,
        buckets_per_octave: int = 8,
        dynamic: bool = False,
    ) -> None:
        """Allocate the cache, in the decoder's type and on its device.

        Args:
            compile: fuse each decoder layer with torch.compile; default on CUDA only. A new shape's first use then
                takes some seconds.
            cuda_graphs: replay a shape's whole step as one graph; default on CUDA, and possible only there.
            padded: pad shapes to buckets; default where they are compiled or graphed, which asks for it.
            dynamic: compile one form for all shapes: a new one then costs its capture only, and runs some 7% slower.
            buckets_per_octave: lengths of prefill between two powers of two: more pad less and capture more.

        Raises:
            RefragError: the decoder is of no Llama type, the cache doesn't fit the device, or graphs are asked for
                without CUDA.
        """
        self.device, self.dtype = decoder.device, decoder.dtype
        on_cuda = self.device.type == "cuda"
        compile = on_cuda if compile is None else compile
        self._graphs = on_cuda if cuda_graphs is None else cuda_graphs
        if self._graphs and not on_cuda:
            raise RefragError(f"CUDA graphs are asked for on {self.device}; leave `cuda_graphs` out")
        self._padded = compile or self._graphs or bool(padded)
        self._buckets_per_octave = buckets_per_octave
        self.max_positions, self.max_batch = max_positions, max_batch
        try:
            self.cache = SlotCache(decoder.config, max_batch, max_positions, self.dtype, self.device, self._padded)
        except torch.OutOfMemoryError as error:
            raise RefragError(
                f"a cache of {max_batch} slots of {max_positions} positions doesn't fit {self.device}; take fewer"
            ) from error
        self._decoder = _twin(decoder)
        run_layer = (
            torch.compile(_run_layer, fullgraph=True, dynamic=None if dynamic else False) if compile else _run_layer
        )
        for layer, cache in zip(_layers(self._decoder), self.cache.layers, strict=True):
            layer.forward = partial(run_layer, layer, cache)
        self._steps: dict[tuple[str, int, int], GraphedStep] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._graphs else None

    @property
    def kv_bytes_per_position(self) -> int:
        """Bytes of keys and values per position and sequence."""
        return self.cache.bytes_per_position

    @torch.inference_mode()
    def prefill(self, embeds: Tensor, slot: int, start: int = 0) -> Tensor:
        """Read embeds [N, d] into a slot at positions start .. start + N; logits [vocabulary] of the last one.

        With start > 0 the slot's earlier positions are read too: a long prompt can be cut, and a copied prefix
        continued. Whatever the slot holds from `start` on is overwritten or never read.

        Raises:
            RefragError: slot or positions lie outside the cache.
        """
        length = len(embeds)
        end = start + length
        if not (length and 0 <= slot < self.max_batch and start >= 0 and end <= self.max_positions):
            raise RefragError(
                f"{length} positions from {start} on in slot {slot} don't fit a cache of {self.max_batch} slots "
                f"of {self.max_positions} positions"
            )
        if not self._padded:
            positions = torch.arange(start, end, device=self.device)[None]
            step = Step(torch.full_like(positions, slot), positions, spans=((slot, end),))
            return self._call(step, positions, inputs_embeds=embeds[None].to(self.dtype), logits_to_keep=1)[0, -1]
        size = min(bucket(length, self._buckets_per_octave), self.max_positions)
        graphed = self._prefill_step(size, self._reach(end) if start else 0)
        graphed.inputs["embeds"][0, :length] = embeds
        # An earlier prompt's NaN would show through the mask.
        graphed.inputs["embeds"][0, length:] = 0
        graphed.inputs["where"].copy_(torch.tensor([slot, start, length]), non_blocking=True)
        return graphed()[0, 0].clone()

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int] | Tensor, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """One token for each of B different slots; logits [B, vocabulary].

        Args:
            token_ids: [B], on any device: a tensor on the decoder's needs no synchronization.
            positions: where each token goes: the number of positions its slot holds so far.

        Raises:
            RefragError: a slot or position lies outside the cache.
        """
        if not (
            len(slots) == len(positions) == len(token_ids) == len(set(slots))
            and all(0 <= slot < self.max_batch for slot in slots)
            and all(0 <= position < self.max_positions for position in positions)
        ):
            raise RefragError(
                f"tokens for slots {list(slots)} at positions {list(positions)} don't fit a cache of "
                f"{self.max_batch} slots of {self.max_positions} positions"
            )
        tokens = torch.as_tensor(token_ids, device=self.device)
        if not self._padded:
            rows, cells = torch.tensor([list(slots), list(positions)], device=self.device)[..., None]
            spans = tuple((slot, position + 1) for slot, position in zip(slots, positions, strict=True))
            return self._call(Step(rows, cells, spans=spans), cells, input_ids=tokens[:, None])[:, 0]
        graphed = self._decode_step(min(batch_bucket(max(slots) + 1), self.max_batch), self._reach(max(positions) + 1))
        where = torch.tensor([list(slots), list(positions)])
        if self.device.type == "cuda":
            # From pageable memory a copy would wait for the step before.
            where = where.pin_memory()
        rows, cells = where.to(self.device, non_blocking=True)
        graphed.inputs["positions"].fill_(-1)[rows] = cells
        graphed.inputs["tokens"][rows] = tokens
        return graphed()[:, 0].index_select(0, rows)

    def warm_up(self, lengths: Sequence[int] = (), batches: Sequence[int] = ()) -> None:
        """Compile and capture ahead of time: prefills of these lengths into an empty slot, steps of these batch
        sizes at every reach up to `max_positions`. Does nothing where shapes are not padded."""
        if not self._padded:
            return
        with torch.inference_mode():
            for length in lengths:
                self._prefill_step(min(bucket(length, self._buckets_per_octave), self.max_positions), 0)
            for batch in batches:
                for end in range(SMALLEST_BUCKET, self.max_positions + SMALLEST_BUCKET, SMALLEST_BUCKET):
                    self._decode_step(min(batch_bucket(batch), self.max_batch), self._reach(end))

    def _call(self, step: Step, position_ids: Tensor, **inputs: Any) -> Tensor:
        return self._decoder(position_ids=position_ids, use_cache=False, step=step, **inputs).logits

    def _reach(self, end: int) -> int:
        """Positions that a padded step reads when `end` are wanted."""
        return min(bucket(end, REACHES_PER_OCTAVE, smallest=128, largest_unit=2**30), self.max_positions)

    def _prefill_step(self, length: int, reach: int) -> GraphedStep:
        """The step that reads `length` padded positions, after earlier ones if `reach` isn't 0."""

        def run(embeds: Tensor, where: Tensor) -> Tensor:
            slot, start, real = where.unbind()
            offsets = torch.arange(length, device=self.device)
            positions = start + offsets
            cells = torch.where(offsets < real, positions, self.cache.spare)
            mask = torch.arange(reach, device=self.device) <= positions[:, None] if reach else None
            step = Step(slot.expand(1, length), cells[None], mask=mask, slot=slot[None] if reach else None)
            last = (real - 1).clamp(min=0)[None]
            return self._call(step, positions[None], inputs_embeds=embeds, logits_to_keep=last)

        def inputs() -> dict[str, Tensor]:
            width = self._decoder.config.hidden_size
            return {
                "embeds": torch.zeros(1, length, width, dtype=self.dtype, device=self.device),
                # Nothing real: what warming up writes goes to the padding's cell.
                "where": torch.tensor([0, 0, 0], device=self.device),
            }

        return self._step(("prefill", length, reach), run, inputs)

    def _decode_step(self, batch: int, reach: int) -> GraphedStep:
        """The step that appends a token to each of the first `batch` slots; position -1: to none."""

        def run(tokens: Tensor, positions: Tensor) -> Tensor:
            rows = torch.arange(batch, device=self.device)
            cells = torch.where(positions >= 0, positions, self.cache.spare)
            # An idle row reads its first position, whatever that holds: a softmax over nothing is no number.
            read = positions.clamp(min=0)[:, None]
            mask = torch.arange(reach, device=self.device) <= read
            step = Step(rows[:, None], cells[:, None], mask=mask[:, None])
            return self._call(step, read, input_ids=tokens[:, None])

        def inputs() -> dict[str, Tensor]:
            return {
                "tokens": torch.zeros(batch, dtype=torch.long, device=self.device),
                "positions": torch.full((batch,), -1, device=self.device),
            }

        return self._step(("decode", batch, reach), run, inputs)

    def _step(
        self, key: tuple[str, int, int], run: Callable[..., Tensor], inputs: Callable[[], dict[str, Tensor]]
    ) -> GraphedStep:
        step = self._steps.pop(key, None) or GraphedStep(run, inputs(), self._pool)
        # The last used stands last.
        self._steps[key] = step
        if len(self._steps) > MOST_STEPS:
            del self._steps[next(iter(self._steps))]
        return step


def bucket(length: int, per_octave: int, smallest: int = SMALLEST_BUCKET, largest_unit: int = LARGEST_UNIT) -> int:
    """The padded form of a length: `per_octave` sizes between two powers of two, none below `smallest`."""
    octave = 1 << max(length - 1, 1).bit_length() - 1
    unit = min(max(octave // per_octave, smallest), largest_unit)
    return -(-length // unit) * unit


def batch_bucket(batch: int) -> int:
    """Powers of two up to 16, then multiples of 16."""
    return 1 << (batch - 1).bit_length() if batch <= 16 else -(-batch // 16) * 16


def _run_layer(layer: nn.Module, slot_cache: tuple[Tensor, Tensor], hidden_states: Tensor, **arguments: Any) -> Tensor:
    return type(layer).forward(layer, hidden_states, slot_cache=slot_cache, **arguments)


def _layers(decoder: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers.

    Raises:
        RefragError: they aren't where those of Llama types are.
    """
    layers = getattr(decoder.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise RefragError(
            f"{type(decoder).__name__} is of no Llama type: it has no list `layers`; choose a decoder that has, such "
            "as Llama, Qwen, Mistral or Gemma-3"
        )
    return layers


def _twin(decoder: PreTrainedModel) -> PreTrainedModel:
    """The same weights in modules and a config of their own, so that the decoder's attention stays its own."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(decoder.parameters(), decoder.buffers())}
    twin = copy.deepcopy(decoder, shared).eval()
    twin.set_attn_implementation(ATTENTION)
    return twin
