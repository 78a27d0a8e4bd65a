"""What a choice of chunks should keep, and learning from that."""

import math

import pytest
import torch

from refrag_platform.training.evidence import (
    HAS_ANSWER,
    IN_GOLD,
    evidence_counts,
    evidence_losses,
    kept_answers,
)


def test_the_loss_is_that_of_picking_what_helps_before_what_does_not() -> None:
    logits = torch.tensor([[1.0, 0.0, 2.0, -math.inf], [0.5, 0.0, 0.0, 0.0]])
    evidence = torch.tensor([[HAS_ANSWER, 0, IN_GOLD, 0], [0] * 4])
    answer = math.log(1 + math.exp(-1.0) + math.exp(1.0))
    # Of a passage's chunks none stands in the other's way; the row without any doesn't count.
    passage = (math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(-2.0))) / 2
    assert evidence_losses(logits, evidence).tolist() == pytest.approx([passage, answer])
    assert evidence_counts(evidence) == [1, 1]


def test_the_loss_is_finite_with_its_gradient_where_there_is_nothing_to_learn() -> None:
    logits = torch.tensor([[1.0, -math.inf], [0.0, 1.0]], requires_grad=True)
    for evidence in (torch.zeros(2, 2), torch.tensor([[HAS_ANSWER, 0], [HAS_ANSWER, HAS_ANSWER]])):
        loss = evidence_losses(logits, evidence).mean()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach()) == 0 and torch.equal(gradient, torch.zeros(2, 2))


def test_an_answer_is_kept_if_all_of_its_chunks_are() -> None:
    evidence = torch.tensor([[HAS_ANSWER, HAS_ANSWER, 0], [HAS_ANSWER, IN_GOLD, 0], [IN_GOLD, 0, 0]])
    keep = torch.tensor([[True, False, True], [True, False, False], [False] * 3])
    assert float(kept_answers(keep, evidence)) == 0.5
