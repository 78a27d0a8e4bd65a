"""Which chunks are best kept as tokens, the policy's or as many others: `refrag evaluate selection --help`.

Every choice keeps as many of the same chunks and is judged by the same tokens after them, so differences are
paired; intervals resample documents. The paper's own gain is 0.005 to 0.03 nats: few windows prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refrag_platform.corpus.question import Passage, Question, with_distractors
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.answering import answers
from refrag_platform.evaluation.metrics import PREFIXES, exact_match, f1, judgeable, mean_gain, rounded
from refrag_platform.evaluation.pruning import self_information
from refrag_platform.evaluation.windows import Windows
from refrag_platform.model.policy import PolicyNetwork, select
from refrag_platform.model.prompts import passage_chunks
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import PAD, Chunks, Prompt, Text, chunk_tokens, unchunk
from refrag_platform.progress import Progress
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.training.core.batch import Batch, to_device
from refrag_platform.training.episodes import (
    Episode,
    collate,
    context_vectors,
    judged_losses,
    log_perplexity,
    policy_inputs,
    question_episode,
    window_episode,
)
from refrag_platform.training.evidence import HAS_ANSWER, evidence_levels, kept_answers

# A window has no question. What stands in for it in the choice by similarity: the chunks that end the context.
QUERY_CHUNKS = 4


@dataclass(frozen=True)
class JudgedSet:
    """Episodes whose choice of chunks is judged; groups: the document of each; references: a question's answers.

    evidence: levels [L] of what each chunk is to its question's answer (training/evidence.py).
    """

    episodes: list[Episode]
    groups: list[str]
    references: list[tuple[str, ...]] | None = None
    evidence: list[Tensor] | None = None


def judged_windows(model: RefragModel, windows: Windows) -> JudgedSet:
    """Windows of text, each judged by how well its continuation is predicted."""
    episodes = [window_episode(row, windows.context_tokens, model) for row in windows.tokens]
    return JudgedSet(episodes, windows.documents)


def judged_questions(
    model: RefragModel,
    questions: Sequence[Question],
    passages: int,
    distractors: Sequence[Passage] | None = None,
    relevance: PassageRelevance | None = None,
) -> JudgedSet:
    """Questions over as many passages, each judged by how well its first answer is predicted.

    Args:
        distractors: what fills up questions with fewer passages; default: the passages of the other questions.
        relevance: what policies are told that read it.

    Raises:
        RefragError: no question has both an answer and passages.
    """
    asked = [one for one in questions if one.kind == "answer" and any(one.answers[:1]) and one.passages]
    if not asked:
        raise RefragError("no question has an answer and passages, so there is nothing to choose chunks for")
    pool = distractors or list({passage: None for one in asked for passage in one.passages})
    episodes, evidence = [], []
    for one in asked:
        read = one.take(passages)
        if len(read) < passages:
            read = with_distractors(one, pool, passages).passages
        cut = [passage_chunks(model.tokenizer, title, text, model.chunk_size) for title, text in read]
        if relevance:
            cut = relevance.tell(one.question, read, cut)
        episodes.append(question_episode(model.tokenizer, one, cut))
        gold = {one.passages[number] for number in one.gold}
        evidence.append(evidence_levels(model.tokenizer, read, cut, gold, one.answers))
    return JudgedSet(episodes, [one.document for one in asked], [one.answers for one in asked], evidence)


@dataclass
class SystemFigures:
    """One system's figures at one share: {metric: [items]}, NaN where an item was not judged."""

    system: str
    share: float
    values: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def put(self, number: int, items: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.values.setdefault(name, np.full(items, np.nan))[number] = value


@torch.inference_mode()
def evaluate_selection(
    model: RefragModel,
    policies: Mapping[str, PolicyNetwork],
    judged: JudgedSet,
    *,
    shares: Sequence[float],
    draws: int = 4,
    oracle: int = 0,
    answered: bool = False,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Every choice at every share, and what each policy gains over the others.

    random: the mean over `draws`. low_perplexity, high_perplexity: the chunks that the model's decoder, reading the
    context as text, finds least or most surprising first. similarity: those nearest to the question by the chunk
    encoder's vectors, their mean over the context taken off; in a window, nearest to its last chunks. relevance: the
    passages that the retriever finds nearest, each from its start, where a policy is told that. last (windows): the end
    of the context. oracle: chunk by chunk the one that most helps the tokens that are judged.

    Args:
        policies: by the name that their rows get.
        oracle: items that it is tried on, spread evenly; each costs T' L readings, so it is for few or short contexts.
        answered: also let questions be answered greedily, for exact match and F1 (of random, the first draw).

    Returns:
        rows: {system, share_kept, P16, ... | answer_log_perplexity, answer_kept, exact_match, f1, windows | questions}.
        answer_kept: share of the questions whose answer stands in a passage as it is, and every chunk of it is kept.
        differences: paired gains of a policy, {share_kept, system, over, metric: [mean, low, high], ...}; above zero
        the policy is better. references_skipped: those of which normalization leaves nothing; exact match and F1 of a
        question that has no other aren't counted.
    """
    items = len(judged.episodes)
    tried = {turn * items // oracle for turn in range(min(oracle, items))} if oracle else set()
    figures: dict[tuple[str, float], SystemFigures] = {}
    size = model.chunk_size
    with Progress("selection", items * len(shares), "choices of chunks") as progress:
        for numbers in _batches(judged.episodes, batch_size):
            episodes = [judged.episodes[number] for number in numbers]
            batch = to_device(collate(episodes, 0.0, size), model.device)
            vectors = context_vectors(model, batch)
            rankings = _rankings(model, policies, episodes, batch, vectors, numbers, draws, seed)
            mask = (batch["chunks"][..., 0] != PAD).cpu()
            for share in shares:
                batch = to_device(collate(episodes, share, size), model.device)
                keep = {system: _keep(scores, mask, share) for system, scores in rankings.items()}
                losses = judged_losses(model, batch, vectors, torch.cat(list(keep.values()), 1).to(model.device))
                parts = losses.cpu().split([flags.shape[1] for flags in keep.values()], 1)
                for (system, flags), part in zip(keep.items(), parts, strict=True):
                    cell = figures.setdefault((system, share), SystemFigures(system, share))
                    for row, number in enumerate(numbers):
                        cell.put(number, items, _figures(part[row], episodes[row], judged))
                        cell.put(number, items, _kept_answer(flags[row], judged, number))
                    if answered and judged.references:
                        _answer(model, episodes, vectors, flags[:, 0], numbers, judged, max_new_tokens, cell)
                for row in [row for row, number in enumerate(numbers) if number in tried]:
                    part = _oracle(model, episodes[row], vectors[row : row + 1, : len(episodes[row].chunks)], share)
                    cell = figures.setdefault(("oracle", share), SystemFigures("oracle", share))
                    cell.put(numbers[row], items, _figures(part, episodes[row], judged))
                progress.update(len(numbers))
    cells = list(figures.values())
    counted = "questions" if judged.references else "windows"
    return {
        "rows": [_row(cell, counted) for cell in sorted(cells, key=lambda cell: shares.index(cell.share))],
        "differences": [
            _difference(figures[name, share], cell, judged.groups, seed)
            for share in shares
            for name in policies
            for cell in cells
            if cell.share == share and cell.system != name
        ],
        "documents_used": len(set(judged.groups)),
        "references_skipped": sum(
            len(references) - len(judgeable(references)) for references in judged.references or []
        ),
    }


def _batches(episodes: Sequence[Episode], size: int) -> Iterator[list[int]]:
    """Numbers of episodes, those of like length together."""
    order = sorted(range(len(episodes)), key=lambda number: len(episodes[number].chunks))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _rankings(
    model: RefragModel,
    policies: Mapping[str, PolicyNetwork],
    episodes: Sequence[Episode],
    batch: Batch,
    vectors: Tensor,
    numbers: Sequence[int],
    draws: int,
    seed: int,
) -> dict[str, Tensor]:
    """Scores [B, draws, L] of every system; the chunks of the highest are kept."""
    rows, most = vectors.shape[:2]
    scores = {
        name: policy(**policy_inputs(model, policy, batch, vectors)).cpu()[:, None] for name, policy in policies.items()
    }
    chance = torch.zeros(rows, draws, most)
    surprise = torch.zeros(rows, 1, most)
    contexts = [unchunk(one.chunks) for one in episodes]
    for row, nats in enumerate(self_information(model, contexts)):
        count = len(episodes[row].chunks)
        # By the item's number, so that the batch size changes nothing.
        random = np.random.default_rng([seed, numbers[row]]).random((draws, count), dtype=np.float32)
        chance[row, :, :count] = torch.from_numpy(random)
        lengths = (episodes[row].chunks != PAD).sum(1)
        sums = torch.zeros(count).index_add(0, torch.arange(count).repeat_interleave(lengths), nats.float())
        surprise[row, 0, :count] = sums / lengths
    scores |= {"random": chance, "low_perplexity": -surprise, "high_perplexity": surprise}
    scores["similarity"] = _similarity(model, episodes, vectors)[:, None]
    if any(policy.reads_relevance for policy in policies.values()) and batch["relevance"].isfinite().any():
        scores["relevance"] = (batch["relevance"].nan_to_num().cpu() - 1e-6 * torch.arange(most))[:, None]
    if not any(one.question for one in episodes):
        scores["last"] = torch.arange(most).float().expand(rows, 1, most)
    return scores


def _similarity(model: RefragModel, episodes: Sequence[Episode], vectors: Tensor) -> Tensor:
    """Cosine [B, L] of each chunk's vector with the question's mean one."""
    similarity = torch.zeros(vectors.shape[:2])
    for row, one in enumerate(episodes):
        chunks = vectors[row, : len(one.chunks)].float()
        asked = chunks[-QUERY_CHUNKS:]
        if one.question:
            asked = model.encode(chunk_tokens(one.question, model.chunk_size)).float()
        # What all chunks have in common says nothing about any of them.
        common = chunks.mean(0)
        near = torch.cosine_similarity(chunks - common, asked.mean(0) - common, dim=-1)
        similarity[row, : len(one.chunks)] = near.cpu()
    return similarity


def _keep(scores: Tensor, mask: Tensor, share: float) -> Tensor:
    """[B, draws, L] flags of the round(p L) highest scores of each row."""
    rows, draws, most = scores.shape
    each = mask[:, None].expand(rows, draws, most).flatten(0, 1)
    return select(scores.flatten(0, 1), each, share).view(rows, draws, most)


def _oracle(model: RefragModel, episode: Episode, vectors: Tensor, share: float) -> Tensor:
    """Losses [1, o] of the chunks picked one after another, each the one that lowers log-perplexity most."""
    batch = to_device(collate([episode], share, model.chunk_size), model.device)
    keep = torch.zeros(len(episode.chunks), dtype=torch.bool, device=model.device)
    for _ in range(batch["most_kept"]):
        left = (~keep).nonzero()[:, 0]
        tries = keep.repeat(len(left), 1)
        tries[torch.arange(len(left), device=model.device), left] = True
        losses = log_perplexity(judged_losses(model, batch, vectors, tries[None]), batch["labels"])
        keep[left[losses[0].argmin()]] = True
    return judged_losses(model, batch, vectors, keep[None, None])[0].cpu()


def _figures(losses: Tensor, episode: Episode, judged: JudgedSet) -> dict[str, float]:
    """Figures of one item from the losses [draws, o] of its choices, the mean over draws."""
    nats = losses[:, : len(episode.output)].double().mean(0)
    if judged.references:
        return {"answer_log_perplexity": float(nats.mean())}
    return {name: float(nats[:tokens].mean()) for name, tokens in PREFIXES.items() if tokens <= len(nats)}


def _kept_answer(flags: Tensor, judged: JudgedSet, number: int) -> dict[str, float]:
    """Whether choices [draws, L] keep every chunk that holds the answer, the mean over draws; nothing if none does."""
    levels = judged.evidence[number] if judged.evidence else torch.zeros(0)
    if not (levels == HAS_ANSWER).any():
        return {}
    return {"answer_kept": float(kept_answers(flags[:, : len(levels)], levels.expand(len(flags), -1)))}


def _answer(
    model: RefragModel,
    episodes: Sequence[Episode],
    vectors: Tensor,
    keep: Tensor,
    numbers: Sequence[int],
    judged: JudgedSet,
    max_new_tokens: int,
    cell: SystemFigures,
) -> None:
    """Exact match and F1 of greedy answers with the chunks of keep [B, L]."""
    prompts: list[Prompt] = []
    for row, one in enumerate(episodes):
        count = len(one.chunks)
        passages = Chunks(one.chunks, keep[row, :count], vectors[row, :count])
        prompts.append((Text(one.before), passages, Text(one.after)))
    assert judged.references is not None
    for row, answer in answers(model, prompts, max_new_tokens, max(2, len(prompts))):
        references = judged.references[numbers[row]]
        if not judgeable(references):
            continue
        text = answer.text.splitlines()[0].strip() if answer.text else ""
        figures = {"exact_match": exact_match(text, references), "f1": f1(text, references)}
        cell.put(numbers[row], len(judged.episodes), figures)


def _row(cell: SystemFigures, counted: str) -> dict[str, Any]:
    means = {name: rounded(np.nanmean(values)) for name, values in cell.values.items()}
    judged = int(max(np.isfinite(values).sum() for values in cell.values.values()))
    return {"system": cell.system, "share_kept": cell.share, **means, counted: judged}


def _difference(policy: SystemFigures, other: SystemFigures, groups: Sequence[str], seed: int) -> dict[str, Any]:
    row: dict[str, Any] = {"share_kept": policy.share, "system": policy.system, "over": other.system}
    for name in [name for name in policy.values if name in other.values]:
        better = 1 if name in {"answer_kept", "exact_match", "f1"} else -1
        gain = better * (policy.values[name] - other.values[name])
        both = np.isfinite(gain)
        judged_groups = [group for group, judged in zip(groups, both, strict=True) if judged]
        row[name] = mean_gain(gain[both], judged_groups, seed)
    return row
