"""How passages are compressed in training: at which rate, and which chunks stay tokens before there is a policy (ours).

A policy chooses once all else is trained, and the decoder must read whatever it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def step_rate(rates: Sequence[int], seed: int, step: int, first_share: float | None = None) -> int:
    """Which of the model's rates all prompts of a step are read at: the first with this chance, None = one as any."""
    chance = np.random.default_rng([seed, 12, step])
    if first_share is None or len(rates) == 1:
        return int(chance.choice(rates))
    others = (1 - first_share) / (len(rates) - 1)
    return int(chance.choice(rates, p=[first_share] + [others] * (len(rates) - 1)))


def kept_at_random(count: int, kept: int, chance: np.random.Generator) -> NDArray[np.int64]:
    """`kept` of `count` chunks: any, or one after another."""
    if chance.random() < 0.5:
        return chance.permutation(count)[:kept]
    return int(chance.integers(count - kept + 1)) + np.arange(kept)


def kept_by_evidence(levels: NDArray[np.int8], kept: int, chance: np.random.Generator) -> NDArray[np.int64]:
    """The `kept` chunks of the highest of levels [L] (`evidence_levels`), as a good policy keeps; of equal ones any."""
    return np.lexsort((chance.random(len(levels)), -levels))[:kept]
