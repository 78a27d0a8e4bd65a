"""Episodes: a prompt with a context of chunks, and the tokens by which the choice of expanded chunks is judged.

Two kinds: a window of text, whose context is continued, and a question over passages, which is answered. The policy's
reward and `refrag evaluate selection` read the same batches with the same code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from refrag_platform.corpus.question import Passage, Question, arranged, keeps_order, mention
from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.model.decoder import decoder_states, head_weight, token_losses
from refrag_platform.model.policy import PolicyNetwork, budget
from refrag_platform.model.prompts import as_turns, content_ids, rag_prompt
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import PAD, Chunks, Prompt, Text, chunk_tokens, lay_slots, pack_slots, prompt_length
from refrag_platform.model.selection import chunk_relevance
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.evidence import evidence_levels
from refrag_platform.training.passage_table import passages_ids
from refrag_platform.training.remembering import RememberingTokenizer
from refrag_platform.training.usable import LeftOut, usable

# Decoder positions of one forward pass over several choices.
POSITIONS_AT_ONCE = 1 << 16
# Rows of questions differ in length: few shapes reach the GPU.
LENGTH_STEP = 32
# Of the episodes of a policy that is told relevance, those that it must do without it.
UNTOLD_SHARE = 0.2
# Draws for each distractor wanted; passages that give the answer away are passed over.
DRAWS = 20
# Steps whose episodes show whether a budget leaves anything to choose.
STEPS_TRIED = 4


@dataclass(frozen=True)
class Episode:
    """Text before the context, the context's chunks [L, k], text after it, and the tokens that are judged.

    lengths: chunks of each of the context's passages; empty: it is one passage, as a window is.
    question: what the policy is told beside the chunks, if it asks; for a window there is none.
    evidence: levels [L] of what each chunk is to the answer (training/evidence.py), where that is known.
    relevance: [L], how near a retriever finds each chunk's passage to the question, where it was asked.
    """

    chunks: Tensor
    output: list[int]
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    question: list[int] = field(default_factory=list)
    evidence: Tensor | None = None
    relevance: Tensor | None = None
    lengths: list[int] = field(default_factory=list)

    @property
    def passages(self) -> list[Tensor]:
        """The chunks of each passage, [length, k]."""
        return list(self.chunks.split(self.lengths or [len(self.chunks)]))

    @property
    def prompt(self) -> Prompt:
        """What is read, no chunk expanded, the judged tokens at its end."""
        return [Text(self.before), Chunks(self.chunks), Text([*self.after, *self.output])]


def window_episode(tokens: Tensor, context_tokens: int, model: RefragModel) -> Episode:
    """A window [s + o]: after the token that starts a text, its first s tokens are the context, the others judged."""
    context = tokens[:context_tokens].view(-1, model.chunk_size)
    return Episode(context, tokens[context_tokens:].tolist(), before=[model.start_token_id])


def question_episode(tokenizer: PreTrainedTokenizerFast, question: Question, passages: Sequence[Chunks]) -> Episode:
    """A question over cut passages, in the one prompt of fine-tuning and serving; its first answer is judged.

    Passages that bring their relevance are told to the policy with it.
    """
    prompt = rag_prompt(tokenizer, question.question, [], as_turns(question.history))
    before, after = [part.token_ids for part in prompt if isinstance(part, Text)]
    return Episode(
        torch.cat([passage.token_ids for passage in passages]),
        content_ids(tokenizer, question.answers[0]),
        before,
        after,
        content_ids(tokenizer, question.question),
        relevance=chunk_relevance(passages),
        lengths=[len(passage.token_ids) for passage in passages],
    )


@dataclass(frozen=True)
class _Drawn:
    """A question, the passages to show and those of them that hold its answer; told: with their relevance."""

    question: Question
    shown: list[Passage]
    gold: list[Passage]
    told: bool


class QuestionEpisodes:
    """Questions over passages, the gold ones among distractors; decided by seed, step and row."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        questions: Sequence[Question],
        passages: int,
        chunk_size: int,
        seed: int,
        ranked_share: float = 0.0,
        min_passages: int | None = None,
        relevance: PassageRelevance | None = None,
        share_kept: float = 0.0,
        positions: int | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        """
        Args:
            passages: in each episode, unless its own gold ones are more.
            ranked_share: of the episodes, those whose passages stand as listed, best first.
            min_passages: if given, the number of passages is drawn for each step, from this up to `passages`.
            relevance: what the policy is told of the passages, in most of the episodes.
            share_kept: of the chunks, those that are kept as tokens. positions: what the decoder reads, at most.
            left_out: what was left out before.

        Raises:
            RefragError: no question has both an answer and passages, or none fits the decoder.
        """
        self._tokenizer = cast(PreTrainedTokenizerFast, RememberingTokenizer(tokenizer))
        self._chunk_size, self._seed, self._passages = chunk_size, seed, passages
        self._share_kept, self._positions = share_kept, positions
        left_out = left_out or LeftOut("policy")
        answered = [one for one in questions if one.kind == "answer" and one.answers]
        self.questions = usable(answered, passages, left_out)
        every = list({passage: None for one in self.questions for passage in one.passages})
        ids = zip(every, passages_ids(tokenizer, every), strict=True)
        self._chunks = {passage: Chunks(chunk_tokens(tokens, chunk_size)) for passage, tokens in ids}
        if positions is not None:
            fitting = [one for one in self.questions if self._room(one) >= 0]
            left_out.add(f"longer than the decoder's {positions:,} positions", len(self.questions) - len(fitting))
            self.questions = fitting
        if not self.questions:
            why = f" ({left_out})" if left_out.reasons else ""
            raise RefragError(
                f"no question with an answer and passages to learn the choice of chunks from{why}; name a file in "
                "policy.questions, or set policy.question_share to 0"
            )
        left_out.say("questions", len(self.questions))
        # What closed questions list says other things of the same matters, each its own.
        self._pool = list({passage: None for one in self.questions if not one.closed for passage in one.passages})
        self._ranked_share, self._min_passages, self._relevance = ranked_share, min_passages or passages, relevance

    def refuse_no_choice(self, batch_size: int) -> None:
        """Refuse a budget that leaves nothing to choose in any episode of the first steps.

        Raises:
            RecipeError: it keeps none of an episode's chunks, or all of them.
        """
        counts = [len(one.chunks) for step in range(STEPS_TRIED) for one in self.draw(step, range(batch_size))]
        if not any(0 < budget(count, self._share_kept) < count for count in counts):
            raise RecipeError(
                f"policy.share_kept is {self._share_kept}: of the {min(counts)} to {max(counts)} chunks of a "
                "question's passages it keeps none or all, so there is nothing to choose; raise policy.passages, "
                "change policy.share_kept, or lower encoder.chunk_size"
            )

    def draw(self, step: int, rows: Sequence[int]) -> list[Episode]:
        """The episodes of these rows of a step's batch."""
        count = int(np.random.default_rng([self._seed, 8, step]).integers(self._min_passages, self._passages + 1))
        drawn = [self._pick(step, row, count) for row in rows]
        if self._relevance:
            asked = [one for one in drawn if one.told]
            self._relevance.learn([one.question.question for one in asked], [p for one in asked for p in one.shown])
        return [self._episode(one) for one in drawn]

    def _pick(self, step: int, row: int, count: int) -> _Drawn:
        random = np.random.default_rng([self._seed, 5, step, row])
        question = self.questions[int(random.integers(len(self.questions)))]
        # Where the gold isn't known, the first passage is taken for it, as a retriever ranked them.
        gold = [question.passages[number] for number in question.gold or (0,)]
        listed = [passage for passage in question.passages if passage not in gold]
        ranked = keeps_order(self._ranked_share, listed, random)
        order = range(len(listed)) if ranked else random.permutation(len(listed))
        count = len(question.passages) if question.closed else count
        room = math.inf if self._positions is None or question.closed else self._room(question)
        others: list[Passage] = []

        def take(passage: Passage) -> None:
            nonlocal room
            cost = 0 if self._positions is None else self._cost(passage)
            if cost <= room:
                others.append(passage)
                room -= cost

        for place in order:
            if len(others) < count - len(gold):
                take(listed[place])
        says = mention(question.answers)
        for _ in range(DRAWS * count):
            if len(gold) + len(others) >= count:
                break
            passage = self._pool[int(random.integers(len(self._pool)))]
            if passage not in gold and passage not in others and not says.search(passage[1]):
                take(passage)
        shown = arranged([*gold, *others], question.passages, ranked, random)
        told = self._relevance is not None and random.random() >= UNTOLD_SHARE
        # What is only taken for gold may not hold the answer: then its mentions alone count.
        return _Drawn(question, shown, gold if question.gold else [], told)

    def _cost(self, passage: Passage) -> int:
        """Positions of a passage with its share of chunks kept, at most."""
        chunks = len(self._chunks[passage].token_ids)
        return chunks + math.ceil(chunks * self._share_kept) * (self._chunk_size - 1)

    def _room(self, question: Question) -> float:
        """Positions that are left for other passages beside a question, those that it needs and its answer."""
        assert self._positions is not None
        prompt = rag_prompt(self._tokenizer, question.question, [], as_turns(question.history))
        text = prompt_length(prompt) + len(content_ids(self._tokenizer, question.answers[0]))
        needed = {question.passages[number] for number in question.needed or (0,)}
        return self._positions - text - sum(map(self._cost, needed))

    def _episode(self, drawn: _Drawn) -> Episode:
        question, shown = drawn.question, drawn.shown
        cut = [self._chunks[passage] for passage in shown]
        if drawn.told and self._relevance:
            cut = self._relevance.tell(question.question, shown, cut)
        episode = question_episode(self._tokenizer, question, cut)
        return replace(episode, evidence=evidence_levels(self._tokenizer, shown, cut, drawn.gold, question.answers))


def collate(episodes: Sequence[Episode], share: float, chunk_size: int) -> Batch:
    """Episodes as tensors, of which a share p of each one's chunks is to be kept.

    slots, owners [B, S] and chunks [B, L, k]: as `lay_slots` has them; question [B, Q, k]; passages [P, l, k]: those of
    all rows; places [B, L]: of each chunk among theirs, 0 where there is none; evidence [B, L]: levels, 0 where none
    is known; relevance [B, L], NaN where it isn't known; kept [B]: T' of each row; labels [B, o]: the tokens that are
    judged, padded with -1, which end the row's slots; length: most positions of a row with T' chunks kept.
    """
    counts = [len(one.chunks) for one in episodes]
    kept = [budget(count, share) for count in counts]
    texts = [len(one.before) + len(one.after) + len(one.output) for one in episodes]
    slots, owners, chunks, _ = lay_slots([one.prompt for one in episodes], chunk_size)
    padded = partial(pad_sequence, batch_first=True, padding_value=PAD)
    passages = padded([part for one in episodes for part in one.passages])
    # The chunks of all rows, in order, among those of the padded passages.
    places = (passages[..., 0] != PAD).flatten().nonzero()[:, 0].split(counts)
    evidence = torch.zeros(chunks.shape[:2], dtype=torch.int8)
    relevance = torch.full(chunks.shape[:2], math.nan)
    for row, one in enumerate(episodes):
        if one.evidence is not None:
            evidence[row, : counts[row]] = one.evidence
        if one.relevance is not None:
            relevance[row, : counts[row]] = one.relevance
    length = max(t + n + expanded * (chunk_size - 1) for t, n, expanded in zip(texts, counts, kept, strict=True))
    if min(counts) < max(counts) or min(texts) < max(texts) or any(one.after for one in episodes):
        length = min(-(-length // LENGTH_STEP) * LENGTH_STEP, slots.shape[1])
    return {
        "slots": slots,
        "owners": owners,
        "chunks": chunks,
        "passages": passages,
        "places": padded(places, padding_value=0),
        "question": padded([chunk_tokens(one.question, chunk_size) for one in episodes]),
        "evidence": evidence,
        "relevance": relevance,
        "kept": torch.tensor(kept),
        "most_kept": max(kept),
        "labels": padded([torch.tensor(one.output) for one in episodes]),
        "length": length,
        "padded": bool((passages == PAD).any()),
    }


def context_vectors(model: RefragModel, batch: Batch) -> Tensor:
    """Vectors [B, L, dim] of a batch's chunks, each passage encoded whole; nothing real where there is no chunk.

    Passages of like length are encoded together: padded to the longest, most of a batch would be padding.
    """
    lengths = (batch["passages"][..., 0] != PAD).sum(1).tolist()
    passages = [passage[:length] for passage, length in zip(batch["passages"], lengths, strict=True)]
    encoded = [
        one.vectors for one in model.with_vectors([Chunks(part) for part in passages]) if one.vectors is not None
    ]
    return pad_sequence(encoded, batch_first=True).flatten(0, 1)[batch["places"]]


def policy_inputs(model: RefragModel, policy: PolicyNetwork, batch: Batch, vectors: Tensor) -> dict[str, Tensor | None]:
    """What the policy is called with: vectors, where there are any, relevance, and the questions if it reads them."""
    inputs: dict[str, Tensor | None] = {"vectors": vectors, "mask": None, "question": None, "question_mask": None}
    inputs["relevance"] = batch["relevance"]
    if batch["padded"]:
        inputs["mask"] = batch["chunks"][..., 0] != PAD
    if policy.reads_question and batch["question"].shape[1]:
        inputs["question"] = model.encode(batch["question"], padded=True).float()
        inputs["question_mask"] = batch["question"][..., 0] != PAD
    return inputs


@torch.no_grad()
def judged_losses(model: RefragModel, batch: Batch, vectors: Tensor, keep: Tensor) -> Tensor:
    """Negative log-likelihood in nats of the judged tokens for each choice: [B, G, o], 0 where there is none.

    Args:
        vectors: [B, L, dim]. keep: [B, G, L], each with its row's T' chunks.
    """
    rows, group = keep.shape[:2]
    owner = torch.arange(rows, device=keep.device).repeat_interleave(group)
    flat, at_once = keep.flatten(0, 1), max(1, POSITIONS_AT_ONCE // batch["length"])
    projected = model.project(vectors.flatten(0, 1)).view(rows, keep.shape[2], -1)
    parts = [
        _judge(model, batch, projected, owner[start : start + at_once], flat[start : start + at_once])
        for start in range(0, len(flat), at_once)
    ]
    return torch.cat(parts).view(rows, group, -1)


def _judge(model: RefragModel, batch: Batch, projected: Tensor, owner: Tensor, keep: Tensor) -> Tensor:
    """[N, o] for choices keep [N, L] of the rows `owner` [N]."""
    token_ids, index, positions = pack_slots(batch["slots"][owner], batch["owners"][owner], keep, batch["length"])
    # Padding stands to the right, where nothing that counts can see it: no mask is needed.
    hidden = decoder_states(model.decoder, model.gather(token_ids, index, projected[owner].flatten(0, 1)))
    labels = batch["labels"][owner]
    real = labels != PAD
    first = positions - real.sum(1) - 1
    places = first[:, None] + torch.arange(labels.shape[1], device=labels.device)
    predicting = hidden.gather(1, places.clamp(0, hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[-1]))
    losses = token_losses(predicting.flatten(0, 1), head_weight(model.decoder), labels.clamp(min=0).flatten())
    return losses.view(labels.shape).masked_fill(~real, 0.0)


def log_perplexity(losses: Tensor, labels: Tensor) -> Tensor:
    """Mean over the judged tokens, [B, G], of losses [B, G, o]."""
    return losses.sum(-1) / (labels != PAD).sum(-1).clamp(min=1)[:, None]
