"""The decoder on vLLM: it is handed, position by position, what our own runner would read.

    decoder = VllmDecoder(folder / "decoder", model.dtype, max_positions=4096, slots=8)
    stream = decoder.submit(prompt_input(model, prompt), Sampling(max_tokens=64), stop_ids)

It stands where a `Scheduler` does. Clients have no way to these vectors: vLLM has no server of its own here, and
`prompt_input` makes them from token ids. vLLM's prefix cache stays off: older versions take every embedded prompt of a
length for the same one.
"""

from __future__ import annotations

import asyncio
import importlib
import threading
import uuid
from collections.abc import Collection
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refrag_platform.decoding.grammar import Matcher, SchemaError
from refrag_platform.decoding.prompts import PromptInput, require_positions
from refrag_platform.decoding.sampling import Token
from refrag_platform.decoding.scheduler import Load
from refrag_platform.decoding.settings import Sampling
from refrag_platform.decoding.stream import Event, Stream
from refrag_platform.errors import RefragError

# As many as the API lets a request ask for.
MOST_LOGPROBS = 20


class VllmDecoder:
    """vLLM's engine with an event loop in a thread of its own; any thread may submit."""

    def __init__(self, folder: Path, dtype: torch.dtype, max_positions: int, slots: int) -> None:
        """
        Args:
            folder: config.json and weights of the decoder. dtype: of the prompts' vectors, and what it computes in.
            slots: sequences that are written at once, at most.

        Raises:
            RefragError: vLLM is not installed.
        """
        self._vllm = _vllm()
        self.max_positions, self.slots = max_positions, slots
        arguments = self._vllm.AsyncEngineArgs(
            model=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_positions,
            max_num_seqs=slots,
            max_logprobs=MOST_LOGPROBS,
            enable_prompt_embeds=True,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        self._engine = self._vllm.AsyncLLMEngine.from_engine_args(arguments)
        self._running: dict[Future[None], Stream] = {}
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests can be taken."""
        return not (self._closed or self._engine.errored)

    def load(self) -> Load:
        """As `Scheduler.load`; vLLM doesn't say which requests wait. Positions and bytes are its own matter, 0 here."""
        running = min(self.slots, len(self._running))
        return Load(running, len(self._running) - running, 0, self.slots * self.max_positions, 0, 0)

    def memory(self) -> str:
        """What keys and values take, for a log."""
        return "keys and values are vLLM's; no beginnings of prompts are kept"

    def submit(
        self,
        prompt: PromptInput,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        cache_salt: str = "",
        matcher: Matcher | None = None,
    ) -> Stream:
        """Queue a request, as `Scheduler.submit` does; nothing is kept that `cache_salt` would keep apart.

        Raises:
            SchemaError: there is a matcher: vLLM is run without a tokenizer, and so without grammars.
            RefragError: it could never run, or the decoder has been shut down.
        """
        if matcher is not None:
            raise SchemaError("on vLLM answers can't be held to a schema here; ask for text, or unset REFRAG_VLLM")
        if self._closed:
            raise RefragError("the decoder has been shut down")
        require_positions(prompt, sampling, self.max_positions)

        def wake() -> None:
            # vLLM ends a request, not one choice of it: what a stopped choice still says is not read.
            if stream.cancelled:
                future.cancel()

        stream = Stream(sampling.n, wake)
        answer = self._answer(prompt.embeds.to("cpu"), sampling, frozenset(stop_ids), stream)
        future = asyncio.run_coroutine_threadsafe(answer, self._loop)
        self._running[future] = stream
        future.add_done_callback(lambda done: self._running.pop(done, None))
        return stream

    def close(self) -> None:
        """End vLLM; open streams fail."""
        self._closed = True
        # The loop may end before it gets to what is cancelled.
        for future, stream in list(self._running.items()):
            stream.put(RefragError("the decoder has been shut down"))
            future.cancel()
        self._engine.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _answer(self, embeds: Tensor, sampling: Sampling, stop_ids: frozenset[int], stream: Stream) -> None:
        """Args: embeds: [N, d], on the CPU, from which vLLM sends it to its own process."""
        try:
            parameters = self._parameters(sampling, stop_ids)
            async for output in self._engine.generate({"prompt_embeds": embeds}, parameters, uuid.uuid4().hex):
                for part in output.outputs:
                    _tell(part, sampling.top_logprobs, stop_ids, stream)
        except Exception as error:
            stream.put(error)

    def _parameters(self, sampling: Sampling, stop_ids: frozenset[int]) -> Any:
        return self._vllm.SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            max_tokens=sampling.max_tokens,
            logprobs=sampling.top_logprobs,
            # These alone end an answer; text, and strings that stop it, are made from token ids where ours are.
            stop_token_ids=sorted(stop_ids),
            ignore_eos=True,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )


def _tell(part: Any, top_logprobs: int | None, stop_ids: frozenset[int], stream: Stream) -> None:
    """What is new of one choice, vLLM's CompletionOutput, as events.

    Raises:
        RefragError: vLLM gave it up.
    """
    for place, token in enumerate(part.token_ids):
        if token in stop_ids:
            continue
        known = part.logprobs[place] if top_logprobs is not None else {}
        ranked = sorted(((one, entry.logprob) for one, entry in known.items()), key=lambda one: -one[1])
        logprob = known[token].logprob if known else None
        stream.put(Event(part.index, Token(token, logprob, tuple(ranked[:top_logprobs]))))
    if part.finish_reason in ("stop", "length"):
        stream.put(Event(part.index, finish_reason=part.finish_reason))
    elif part.finish_reason is not None:
        raise RefragError(f"vLLM ended the answer by {part.finish_reason!r}")


def _vllm() -> Any:
    """vLLM, which brings a CUDA build of torch of its own choice and is no requirement of ours.

    Raises:
        RefragError: it is not installed.
    """
    try:
        module = importlib.import_module("vllm")
        importlib.import_module("vllm.sampling_params")
    except ImportError as error:
        raise RefragError(
            f"vLLM can't be imported ({error}); install it on a machine with CUDA (`pip install vllm`, which chooses "
            "torch: in an environment of its own), or unset REFRAG_VLLM for the decoder that comes with this project"
        ) from error
    return module
