"""How a token is drawn."""

import pytest
import torch

from refrag_platform.decoding.sampling import Sampler, pick_batch
from refrag_platform.decoding.settings import Sampling
from refrag_platform.errors import RefragError

LOGITS = torch.tensor([0.0, 5.0, 1.0, 4.0])


def drawn(sampling: Sampling, times: int = 50, choice: int = 0) -> list[int]:
    sampler = Sampler(sampling, choice)
    return [sampler.pick(LOGITS).id for _ in range(times)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(drawn(Sampling(1))) == {1}


@pytest.mark.parametrize(("top_p", "within"), [(0.5, {1}), (0.8, {1, 3}), (1.0, {0, 1, 2, 3})])
def test_draws_stay_within_top_p(top_p: float, within: set[int]) -> None:
    assert set(drawn(Sampling(1, temperature=1.0, top_p=top_p, seed=0), 500)) == within


def test_draws_follow_the_distribution() -> None:
    many = torch.tensor(drawn(Sampling(1, temperature=2.0, seed=0), 4000))
    shares = torch.bincount(many, minlength=4) / len(many)
    torch.testing.assert_close(shares, (LOGITS / 2).softmax(-1), atol=0.03, rtol=0)


def test_a_seed_repeats_and_a_choice_has_its_own() -> None:
    sampling = Sampling(1, temperature=3.0, seed=2**63 - 1)
    assert drawn(sampling) == drawn(sampling) != drawn(sampling, choice=1)
    assert drawn(sampling, choice=1) == drawn(Sampling(1, temperature=3.0, seed=0))
    assert drawn(Sampling(1, temperature=3.0)) != drawn(Sampling(1, temperature=3.0))


def test_log_probabilities_ignore_the_temperature() -> None:
    token = Sampler(Sampling(1, temperature=2.0, seed=0, top_logprobs=2)).pick(LOGITS)
    expected = LOGITS.log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected[token.id]))
    assert [one for one, _ in token.top] == [1, 3]
    assert Sampler(Sampling(1, top_logprobs=0)).pick(LOGITS).top == ()


def test_rows_of_a_batch_are_drawn_each_by_its_own_settings() -> None:
    settings = [Sampling(1), Sampling(1, temperature=1.0, seed=3), Sampling(1, top_logprobs=1)]
    batch = pick_batch([Sampler(one) for one in settings], LOGITS.expand(3, -1))
    assert batch == [Sampler(one).pick(LOGITS) for one in settings]


@pytest.mark.parametrize("sampling", [Sampling(1, temperature=1e-38, seed=0), Sampling(1, 1.0, top_p=1e-50, seed=0)])
def test_settings_near_zero_take_the_likeliest(sampling: Sampling) -> None:
    assert set(drawn(sampling)) == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_distribution_is_no_other_rows_fault(temperature: float) -> None:
    samplers = [Sampler(Sampling(1, temperature=temperature, seed=0)) for _ in range(2)]
    fine, broken = pick_batch(samplers, torch.stack([LOGITS, LOGITS * float("nan")]))
    assert fine == Sampler(Sampling(1, temperature=temperature, seed=0)).pick(LOGITS)
    assert isinstance(broken, RefragError) and "highest logit is nan" in str(broken)
