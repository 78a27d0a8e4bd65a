"""The curriculum of table 8: from samples of one chunk to samples of 256.

Factor f = 2^i means a sample of f chunks. The published counts follow a rule: the first stage has
a_i = max(1, floor(1333 / 4^i)) samples of factor 2^i, and the counts of the nine stages are geometric with
the ratio that makes them add up to the factor's target. The table is read as proportions per stage.
"""

from __future__ import annotations

import numpy as np

FACTORS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STAGES = 9
TOTALS = (2000, 2000, 2000, 4000, 4000, 4000, 8000, 8000, 8000)
FIRST = 1333


def table() -> np.ndarray:
    """Table 8: samples of each factor (rows) in each stage (columns), [9, 9]."""
    rows = []
    for exponent, total in enumerate(TOTALS):
        # From factor 64 on the published rows are alike: the floor has reached one.
        first = max(1, FIRST // 4**exponent)
        ratio = _ratio(first, total)
        rows.append([round(first * ratio**stage) for stage in range(STAGES)])
    return np.array(rows)


def _ratio(first: int, total: int) -> float:
    """The r with sum over t = 0..8 of first r^t = total, by bisection (the sum grows with r)."""
    low, high = 0.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        if sum(first * middle**stage for stage in range(STAGES)) < total:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class Curriculum:
    """Which factor each training step uses.

    A step's samples all have one factor, so that batches are rectangular. Steps are divided evenly over
    the table's stages; within a stage a factor is drawn with the probability that makes *samples* come in
    the table's proportions although a step of long samples holds fewer of them.
    """

    def __init__(
        self,
        steps: int,
        max_factor: int,
        stages: int,
        samples_per_step: dict[int, int],
        seed: int,
        one_chunk_share: float = 0.0,
    ) -> None:
        """
        Args: samples_per_step: how many samples of a factor fit one step. one_chunk_share: of every stage's steps, at
            least, with samples of one chunk, which table 8 soon gives up.
        """
        self.steps, self.stages, self.seed = max(1, steps), stages, seed
        self.factors = [factor for factor in FACTORS if factor <= max_factor]
        # Fewer stages than nine: evenly spaced columns, the first and (but for a single stage) the last among them.
        columns = np.linspace(0, STAGES - 1, stages).round().astype(int)
        counts = table()[: len(self.factors), columns].astype(float)
        per_step = np.array([samples_per_step[factor] for factor in self.factors], dtype=float)[:, None]
        weights = counts / per_step
        # Table 8 ends without samples of one chunk, and a curriculum may have nothing else.
        weights[:, weights.sum(0) == 0] = 1.0
        weights[0] = np.maximum(weights[0], weights[1:].sum(0) * one_chunk_share / (1 - one_chunk_share))
        self.probabilities = weights / weights.sum(0)

    def factor(self, step: int) -> int:
        """The factor of a step, decided by the seed and the step alone. Steps past the end use the last stage."""
        stage = min(step * self.stages // self.steps, self.stages - 1)
        draw = np.random.default_rng([self.seed, 8, step]).random()
        position = int(np.searchsorted(self.probabilities[:, stage].cumsum(), draw, side="right"))
        return self.factors[min(position, len(self.factors) - 1)]
