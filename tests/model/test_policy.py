"""The policy network and its Plackett-Luce picks."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.model.policy import (
    LIKENESS,
    PolicyNetwork,
    budget,
    keep_mask,
    pick_log_probs,
    sample_picks,
    select,
)


def test_selection_keeps_the_top_share_of_the_real_chunks() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.0, 9.0], [1.0, 0.0, 5.0, 4.0]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    assert select(logits, mask, 0.5).tolist() == [[False, True, True, False], [False, False, True, True]]
    assert budget(10, 0.25) == 2 and budget(3, 0.0) == 0 and budget(3, 1.0) == 3


def test_pick_probabilities_sum_to_one_over_all_ordered_picks() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.5]])
    orders = torch.tensor([list(itertools.permutations(range(4), 2))])
    total = pick_log_probs(logits, orders).sum(-1).exp().sum()
    assert math.isclose(float(total), 1.0, abs_tol=1e-5)


def test_samples_follow_the_plackett_luce_probabilities() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    picks = sample_picks(logits, 2, 20_000, torch.Generator().manual_seed(0))
    for order in itertools.permutations(range(3), 2):
        expected = float(pick_log_probs(logits, torch.tensor([[list(order)]])).sum().exp())
        found = float((picks[0] == torch.tensor(order)).all(-1).float().mean())
        assert abs(found - expected) < 0.015
    assert keep_mask(picks[0, :1], 3).sum() == 2


def test_a_fresh_policy_is_uniform_and_survives_a_save(tmp_path: Path) -> None:
    policy = PolicyNetwork(8, 16, 2, 2, 0.25).eval()
    vectors = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(policy(vectors), torch.zeros(2, 5))
    torch.nn.init.normal_(policy.head[1].weight)
    policy.save(tmp_path)
    loaded = PolicyNetwork.load(tmp_path)
    torch.testing.assert_close(loaded(vectors), policy(vectors))
    assert loaded.share_kept == 0.25
    with pytest.raises(ArtifactError, match="holds no policy"):
        PolicyNetwork.load(tmp_path / "nowhere")


def test_padding_changes_no_real_chunk_s_score() -> None:
    policy = PolicyNetwork(8, 16, 2, 2, 0.25).eval()
    torch.nn.init.normal_(policy.head[1].weight)
    vectors = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([vectors, torch.full((1, 3, 8), 7.0)], 1)
    mask = torch.tensor([[True] * 4 + [False] * 3])
    torch.testing.assert_close(policy(padded, mask)[:, :4], policy(vectors), atol=1e-5, rtol=1e-5)
    assert torch.isinf(policy(padded, mask)[:, 4:]).all()


def asking_policy() -> PolicyNetwork:
    torch.manual_seed(0)
    policy = PolicyNetwork(8, 16, 2, 2, 0.25, "question").eval()
    for weight in (policy.head[1].weight, policy.match.weight):
        torch.nn.init.normal_(weight)
    return policy


def test_only_a_policy_that_reads_it_changes_its_scores_by_the_question(tmp_path: Path) -> None:
    policy, blind = asking_policy(), PolicyNetwork(8, 16, 2, 2, 0.25).eval()
    torch.nn.init.normal_(blind.head[1].weight)
    vectors, *questions = torch.randn(3, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(policy(vectors, question=questions[0]), policy(vectors, question=questions[1]))
    assert torch.equal(blind(vectors, question=questions[0]), blind(vectors))
    policy.save(tmp_path)
    loaded = PolicyNetwork.load(tmp_path)
    assert loaded.reads_question and not blind.reads_question
    torch.testing.assert_close(loaded(vectors, question=questions[0]), policy(vectors, question=questions[0]))


def test_padding_of_a_question_changes_no_score_and_one_that_is_all_padding_is_none() -> None:
    policy = asking_policy()
    vectors, question = torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([question, torch.full((2, 2, 8), 7.0)], 1)
    mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    scores = policy(vectors, question=padded, question_mask=mask)
    torch.testing.assert_close(scores[:1], policy(vectors[:1], question=question[:1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores[1:], policy(vectors[1:]), atol=1e-5, rtol=1e-5)


def test_a_policy_that_was_saved_before_there_were_questions_is_blind(tmp_path: Path) -> None:
    PolicyNetwork(8, 16, 2, 2, 0.25).save(tmp_path)
    settings = json.loads((tmp_path / "policy.json").read_text())
    assert settings.pop("query") == "none"
    (tmp_path / "policy.json").write_text(json.dumps(settings))
    assert not PolicyNetwork.load(tmp_path).reads_question


def test_a_policy_from_before_there_was_a_likeness_has_none_and_others_are_refused(tmp_path: Path) -> None:
    policy = asking_policy()
    policy.save(tmp_path)
    weights = load_file(tmp_path / "policy.safetensors")
    older = {name: tensor for name, tensor in weights.items() if name not in LIKENESS}
    save_file(older, tmp_path / "policy.safetensors")
    vectors, question = torch.randn(1, 5, 8), torch.randn(1, 2, 8)
    found = PolicyNetwork.load(tmp_path)
    with torch.no_grad():
        for name in LIKENESS:
            policy.state_dict()[name].zero_()
        torch.testing.assert_close(found(vectors, question=question), policy(vectors, question=question))
    save_file(weights | {"other": torch.zeros(1)}, tmp_path / "policy.safetensors")
    with pytest.raises(ArtifactError, match="another policy network: it differs in other"):
        PolicyNetwork.load(tmp_path)


def test_vectors_that_are_all_alike_give_no_metric_and_no_likeness() -> None:
    policy = asking_policy()
    with pytest.raises(RefragError, match="all alike"):
        policy.fit(torch.ones(10, 8))
    policy.fit(torch.randn(100, 8))
    same = torch.randn(1, 1, 8).expand(1, 6, 8)
    mask = torch.ones(1, 6).bool()
    likeness = policy._likeness(same, mask, torch.randn(1, 1, 8), mask[:, :1])
    assert likeness.abs().max() < 0.1


def test_picks_beyond_a_row_s_own_budget_count_for_nothing() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0], [0.5, -math.inf, -math.inf, -math.inf]], requires_grad=True)
    counted = torch.tensor([[True, True], [True, False]])
    picks = sample_picks(logits.detach(), 2, 3, torch.Generator().manual_seed(0))
    assert keep_mask(picks, 4, counted).sum(-1).tolist() == [[2] * 3, [1] * 3]
    log_probs = pick_log_probs(logits, picks, counted)
    assert (log_probs[1] == 0).all()
    log_probs.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_a_fitted_policy_starts_from_the_rare_words_that_question_and_chunks_share(tmp_path: Path) -> None:
    """Every chunk says much of frequent words and one rare word; the question says frequent ones, too."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(200, 24, generator=generator)

    def said(rare: torch.Tensor) -> torch.Tensor:
        frequent = torch.randint(0, 4, (*rare.shape, 6), generator=generator)
        return 3 * words[frequent].sum(-2) + words[rare]

    policy = PolicyNetwork(24, 16, 1, 2, 0.1, "question").eval()
    policy.fit(said(torch.randint(4, 200, (5000,), generator=generator)))
    rare = torch.stack([torch.randperm(196, generator=generator)[:30] + 4 for _ in range(64)])
    chunks, question = said(rare), said(rare[:, :1] + 0)
    with torch.no_grad():
        likeness = policy._likeness(chunks, torch.ones(64, 30).bool(), question, torch.ones(64, 1).bool())
    nearest = torch.cosine_similarity(chunks, question, dim=-1).argmax(1)
    assert (likeness[..., 0].argmax(1) == 0).float().mean() > 0.8 > 0.4 > (nearest == 0).float().mean()
    policy.save(tmp_path)
    assert torch.equal(PolicyNetwork.load(tmp_path).metric, policy.metric)


def test_the_neighbourhood_of_a_likely_chunk_is_likely_too() -> None:
    policy = PolicyNetwork(8, 16, 1, 2, 0.1, "question").eval()
    policy.fit(torch.eye(8).repeat(20, 1) + 0.01 * torch.randn(160, 8, generator=torch.Generator().manual_seed(0)))
    chunks = torch.zeros(1, 40, 8)
    chunks[0, 10, 3], mask = 1.0, torch.ones(1, 40).bool()
    question = torch.zeros(1, 1, 8)
    question[0, 0, 3] = 1.0
    with torch.no_grad():
        logits = policy(chunks, mask, question)[0]
    assert logits.argmax() == 10 and logits[11] > logits[16] > logits[35]


def test_a_policy_that_is_told_relevance_starts_from_it_and_does_without(tmp_path: Path) -> None:
    policy = PolicyNetwork(8, 16, 1, 2, 0.25, "question", relevance=True).eval()
    vectors, question = torch.randn(2, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    told = torch.tensor([[0.1, 0.1, 0.7, 0.7, 0.3, 0.3]])
    with torch.no_grad():
        scores = policy(vectors, question=question, relevance=told)
        untold = policy(vectors, question=question)
        assert torch.equal(policy(vectors, question=question, relevance=torch.full_like(told, torch.nan)), untold)
    assert policy.reads_relevance and set(select(scores - untold, None, 1 / 3)[0].nonzero()[:, 0].tolist()) == {2, 3}
    policy.save(tmp_path)
    loaded = PolicyNetwork.load(tmp_path)
    torch.testing.assert_close(loaded(vectors, question=question, relevance=told), scores)


def test_relevance_is_read_where_it_is_known_and_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    policy = PolicyNetwork(8, 16, 1, 2, 0.25, "question", relevance=True).eval()
    for weight in (policy.relevance.weight, policy.relevance_lift.weight, policy.head[1].weight):
        torch.nn.init.normal_(weight)
    vectors = torch.randn(1, 4, 8)
    told = torch.tensor([[0.2, torch.nan, 0.5, 0.5]])
    with torch.no_grad():
        scores = policy(vectors, relevance=told)
        padded = policy(
            torch.cat([vectors, torch.ones(1, 2, 8)], 1),
            torch.tensor([[True] * 4 + [False] * 2]),
            relevance=torch.cat([told, torch.tensor([[9.0, torch.nan]])], 1),
        )
    assert scores.isfinite().all()
    torch.testing.assert_close(padded[:, :4], scores, atol=1e-5, rtol=1e-5)


def test_a_policy_from_before_there_was_relevance_reads_none(tmp_path: Path) -> None:
    PolicyNetwork(8, 16, 2, 2, 0.25, "question").save(tmp_path)
    settings = json.loads((tmp_path / "policy.json").read_text())
    assert settings.pop("relevance") is False
    (tmp_path / "policy.json").write_text(json.dumps(settings))
    assert not PolicyNetwork.load(tmp_path).reads_relevance
