"""A step of fixed shape: static inputs and, on CUDA, one graph that is replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP_CALLS = 2
# Each shape is a version of one compiled function.
MOST_VERSIONS = 256


class GraphedStep:
    """Fill `inputs` in place, then call; the result is overwritten by the next call.

    pool: of `torch.cuda.graph_pool_handle`, None = no graph. Graphs of one pool share their working memory, so only
    one may run at a time.
    """

    def __init__(self, run: Callable[..., Tensor], inputs: dict[str, Tensor], pool: Any) -> None:
        self.inputs = inputs
        self._run = run
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch._dynamo.config.patch(recompile_limit=MOST_VERSIONS):
            if pool is None:
                run(**inputs)
                return
            # Libraries choose and allocate in the first calls, on a stream other than the one that captures.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_CALLS):
                    run(**inputs)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._result = run(**inputs)

    def __call__(self) -> Tensor:
        if self._graph is None:
            return self._run(**self.inputs)
        self._graph.replay()
        return self._result
