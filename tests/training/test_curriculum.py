"""The curriculum's rule against the published table 8."""

from collections import Counter

import pytest

from refrag_platform.training.core.curriculum import Curriculum, table

PUBLISHED = [
    [1333, 445, 148, 49, 16, 6, 2, 1, 0],
    [333, 298, 267, 238, 213, 191, 171, 153, 137],
    [83, 102, 126, 156, 193, 238, 293, 362, 447],
    [20, 35, 61, 106, 185, 324, 565, 985, 1719],
    [5, 11, 23, 48, 103, 220, 468, 997, 2125],
    [1, 3, 7, 19, 50, 133, 353, 939, 2496],
    [1, 3, 9, 25, 73, 212, 618, 1802, 5259],
    [1, 3, 9, 25, 73, 212, 618, 1802, 5259],
    [1, 3, 9, 25, 73, 212, 618, 1802, 5259],
]


def test_the_rule_gives_every_published_cell() -> None:
    assert table().tolist() == PUBLISHED


def test_samples_come_in_the_table_s_proportions_though_steps_hold_different_numbers() -> None:
    per_step = {2**i: 256 // 2**i for i in range(9)}
    curriculum = Curriculum(18_000, 256, 9, per_step, seed=0)
    for stage, column in enumerate(zip(*PUBLISHED, strict=True)):
        samples = [p * n for p, n in zip(curriculum.probabilities[:, stage], per_step.values(), strict=True)]
        shares = [count / sum(samples) for count in samples]
        assert shares == pytest.approx([count / sum(column) for count in column])
    drawn = Counter(curriculum.factor(step) for step in range(16_000, 18_000))  # the last stage
    for factor, probability in zip(per_step, curriculum.probabilities[:, -1], strict=True):
        assert abs(drawn[factor] / 2000 - probability) < 0.04


def test_the_first_stage_is_short_samples_and_the_last_long_ones() -> None:
    per_step = dict.fromkeys((2**i for i in range(9)), 1)
    curriculum = Curriculum(900, 256, 9, per_step, seed=0)
    first = [curriculum.factor(step) for step in range(100)]
    last = [curriculum.factor(step) for step in range(800, 900)]
    assert sum(first) / 100 < 8 < 64 < sum(last) / 100
    assert [curriculum.factor(step) for step in range(100)] == first


def test_a_smaller_largest_factor_is_kept_to() -> None:
    curriculum = Curriculum(30, 8, 3, dict.fromkeys((1, 2, 4, 8), 1), seed=0)
    assert {curriculum.factor(step) for step in range(60)} <= {1, 2, 4, 8}


def test_a_share_of_every_stage_s_steps_keeps_to_one_chunk() -> None:
    per_step = {1: 8, 2: 4, 4: 2, 8: 1}
    plain = Curriculum(400, 8, 4, per_step, seed=0)
    kept = Curriculum(400, 8, 4, per_step, seed=0, one_chunk_share=0.2)
    assert plain.probabilities[0, -1] < 0.01
    assert kept.probabilities[0].tolist() == pytest.approx([plain.probabilities[0, 0], 0.2, 0.2, 0.2])
    assert kept.probabilities.sum(0).tolist() == pytest.approx([1.0] * 4)
    rest = plain.probabilities[1:, -1] / plain.probabilities[1:, -1].sum()
    assert (kept.probabilities[1:, -1] / 0.8).tolist() == pytest.approx(rest.tolist())
    assert Curriculum(4, 1, 2, {1: 1}, seed=0, one_chunk_share=0.2).probabilities.tolist() == [[1.0, 1.0]]
