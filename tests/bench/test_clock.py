"""How times are taken."""

import torch

from refrag_platform.bench.clock import Case, Ceilings, Times, in_turns


def test_cases_take_turns_after_warming_up() -> None:
    calls: list[str] = []
    cases = {
        "one": Case(lambda: calls.append("one"), prepare=lambda: calls.append("prepared")),
        "two": Case(lambda: calls.append("two")),
    }
    times = in_turns(cases, runs=2, warmup=1, device=torch.device("cpu"))
    assert calls == ["prepared", "one", "two", "prepared", "one", "two", "two", "prepared", "one"]
    assert {name: len(found.seconds) for name, found in times.items()} == {"one": 2, "two": 2}


def test_median_and_quartiles() -> None:
    times = Times((5.0, 1.0, 2.0, 4.0, 3.0))
    assert times.median == 3.0 and times.quartiles == (2.0, 4.0)
    assert Times((1.5,)).quartiles == (1.5, 1.5)


def test_ceilings_are_rates() -> None:
    ceilings = Ceilings.measure(torch.device("cpu"), torch.float32, runs=1)
    assert ceilings.peak > 1e8 and ceilings.bandwidth > 1e8
