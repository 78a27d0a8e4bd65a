"""The block-by-block loss is plain cross-entropy: its value and both gradients."""

import pytest
import torch
from torch import nn

from refrag_platform.model.decoder import token_losses
from refrag_platform.training.core import losses
from refrag_platform.training.core.losses import linear_cross_entropy


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(37, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(101, 16, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 101, (37,), generator=generator)


def _assert_alike(loss: torch.Tensor, expected: torch.Tensor, *leaves: torch.Tensor) -> None:
    """One value, and one gradient of three times it, by each of the leaves."""
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    found, wanted = (torch.autograd.grad(value * 3, leaves) for value in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_loss_and_gradients_are_those_of_plain_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    # 37 rows in blocks of 16: two whole ones and a rest.
    monkeypatch.setattr(losses, "ROWS", 16)
    hidden, weight, labels = _inputs(torch.float64)
    expected = nn.functional.cross_entropy(hidden @ weight.t(), labels)
    _assert_alike(linear_cross_entropy(hidden, weight, labels), expected, hidden, weight)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, labels = _inputs()
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_loss_under_bf16_autocast_is_close_to_float32() -> None:
    hidden, weight, labels = _inputs()
    exact = linear_cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        rough = linear_cross_entropy(hidden, weight, labels)
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)


def test_token_losses_average_to_the_loss() -> None:
    hidden, weight, labels = _inputs()
    each = token_losses(hidden, weight, labels)
    torch.testing.assert_close(each.mean(), linear_cross_entropy(hidden, weight, labels), rtol=1e-5, atol=1e-6)
