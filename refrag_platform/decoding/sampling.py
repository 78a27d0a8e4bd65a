"""From logits to a token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refrag_platform.decoding.settings import Sampling
from refrag_platform.errors import RefragError

if TYPE_CHECKING:
    from refrag_platform.decoding.grammar import Matcher

SEEDS = 2**63
# Below it a draw takes the likeliest token, and dividing by it would overflow.
LOWEST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Token:
    """A drawn token. logprob and top (the likeliest tokens and theirs, best first) are those of the model's own
    distribution, whatever temperature and schema; None and empty unless asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws one choice's tokens, with a generator of its own: neighbours in a batch change nothing."""

    def __init__(self, sampling: Sampling, choice: int = 0, matcher: Matcher | None = None) -> None:
        """matcher: holds the choice to a grammar, and goes on with each token."""
        self.sampling, self._matcher = sampling, matcher
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((sampling.seed + choice) % SEEDS)

    @property
    def takes_likeliest(self) -> bool:
        """Whether the arg max is all that is asked for."""
        return self.sampling.temperature <= 0 and self.sampling.top_logprobs is None and self._matcher is None

    @property
    def whole(self) -> bool:
        """Whether a grammar lets nothing follow what was drawn."""
        return self._matcher is not None and self._matcher.whole

    def pick(self, logits: Tensor) -> Token:
        """One token from logits [vocabulary]; where there is a grammar, one of those that it allows."""
        logits = logits.float().cpu()
        if self._matcher is None:
            drawn = self._drawn(logits)
        else:
            allowed = self._matcher.allowed()
            drawn = int(allowed[self._drawn(logits[allowed])])
            self._matcher.advance(drawn)
        if self.sampling.top_logprobs is None:
            return Token(drawn)
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(self.sampling.top_logprobs)
        return Token(
            drawn, float(logprobs[drawn]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        )

    def _drawn(self, logits: Tensor) -> int:
        if self.sampling.temperature <= 0:
            return int(logits.argmax())
        return draw(logits, self.sampling.temperature, self.sampling.top_p, self._generator)


def pick_batch(samplers: list[Sampler], logits: Tensor) -> list[Token | Exception]:
    """A token for each row of logits [B, vocabulary]; rows that only take the likeliest share one transfer.

    A row that can't be drawn from has its error instead, so that it is no other row's.
    """

    def pick(sampler: Sampler, row: Tensor, highest: float, best: float) -> Token | Exception:
        if not math.isfinite(highest):
            return RefragError(f"the decoder's highest logit is {highest}")
        try:
            return Token(int(best)) if sampler.takes_likeliest else sampler.pick(row)
        except Exception as error:
            return error

    # In one transfer; ids are whole numbers that a double holds.
    maxima = torch.stack([part.double() for part in logits.max(-1)], 1).tolist()
    return [pick(sampler, row, *highest) for sampler, row, highest in zip(samplers, logits, maxima, strict=True)]


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """One id from logits [vocabulary] on the CPU, within the smallest set of tokens whose probability reaches top_p."""
    probabilities = ((logits - logits.max()) / max(temperature, LOWEST_TEMPERATURE)).softmax(-1)
    ranked, order = probabilities.sort(descending=True)
    outside = ranked.cumsum(0) - ranked >= top_p
    # The likeliest always stays, however small top_p is.
    outside[0] = False
    ranked = ranked.masked_fill(outside, 0.0)
    return int(order[torch.multinomial(ranked, 1, generator=generator)])
