"""bfloat16 is computed where the machine can; a CPU that can't takes float32, and trains no slower for it."""

import pytest
import torch

from refrag_platform.training.core import precision
from refrag_platform.training.core.precision import autocast, computes_bf16

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("able", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_what_it_can_multiply(
    monkeypatch: pytest.MonkeyPatch, able: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: able)
    with autocast("bf16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert computes_bf16("bf16", CPU) == able
    assert computes_bf16("bf16", GPU)


def test_what_the_recipe_does_not_ask_for_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    assert not computes_bf16("fp32", CPU) and not computes_bf16("fp32", GPU)
