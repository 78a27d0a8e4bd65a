"""What a choice of chunks should keep, and learning from that."""

from __future__ import annotations

import math

import pytest
import torch

from refrag_platform.training.evidence import evidence_loss, kept_answers


def test_the_loss_is_that_of_picking_a_chunk_with_the_answer_before_all_that_have_none() -> None:
    logits = torch.tensor([[1.0, 0.0, 2.0, -math.inf], [0.5, 0.0, 0.0, 0.0]])
    evidence = torch.tensor([[True, False, True, False], [False] * 4])
    # Of the answer's chunks none stands in the other's way; the row without any doesn't count.
    expected = -sum(math.log(math.exp(one) / (math.exp(one) + 1)) for one in (1.0, 2.0)) / 2
    assert float(evidence_loss(logits, evidence)) == pytest.approx(expected)


def test_the_loss_is_finite_with_its_gradient_where_there_is_nothing_to_learn() -> None:
    logits = torch.tensor([[1.0, -math.inf], [0.0, 1.0]], requires_grad=True)
    for evidence in (torch.zeros(2, 2).bool(), torch.tensor([[True, False], [True, True]])):
        loss = evidence_loss(logits, evidence)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach()) == 0 and torch.equal(gradient, torch.zeros(2, 2))


def test_an_answer_is_kept_if_all_of_its_chunks_are() -> None:
    evidence = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    keep = torch.tensor([[True, False, True], [True, False, False], [False] * 3])
    assert float(kept_answers(keep, evidence)) == 0.5
