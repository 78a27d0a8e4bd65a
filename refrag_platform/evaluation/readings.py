"""The prompts of each system (evaluation/systems.py) for a question and its passages, and who reads them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from refrag_platform.corpus.question import Passage, Question
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.pruning import pruned
from refrag_platform.evaluation.sentences import Sentence, nearest_sentences, split_passage
from refrag_platform.evaluation.systems import Order, Reading, System, control_of
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.prompts import INSTRUCTIONS, as_turns, content_ids, passage_chunks, passage_text, rag_prompt
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import PAD, Chunks, Prompt, Text, plain_tokens, prompt_length, unchunk
from refrag_platform.model.selection import expand
from refrag_platform.store.relevance import PassageRelevance


@dataclass(frozen=True)
class Readers:
    """Who answers: the model; for plain text the tuned controls where there are any; the untuned decoder.

    relevance: how near a retriever finds the passages; `sentences` and the order `nearest` need it.
    told: whether a policy that reads relevance is told. order: in which the passages are read. stored: by question, the
    chunks of its passages as a store has them, with vectors and relevance; other passages are encoded here.
    """

    model: RefragModel
    policy: PolicyNetwork | None
    controls: Mapping[System, RefragModel]
    untuned: RefragModel | None = None
    relevance: PassageRelevance | None = None
    told: bool = True
    order: Order = "listed"
    seed: int = 0
    stored: Mapping[Question, Mapping[Passage, Chunks]] = field(default_factory=dict)

    def of(self, system: System) -> RefragModel:
        """The reader of a system's prompts."""
        if system == "untuned":
            if self.untuned is None:
                raise RefragError("the system `untuned` needs the recipe's decoder, and the recipe isn't known")
            return self.untuned
        if system == "kept+zero":
            return self._zeros
        control = control_of(system, self.controls)
        return self.model if control is None else self.controls[control]

    @cached_property
    def _zeros(self) -> RefragModel:
        """The model whose decoder reads zeros wherever there is a vector."""
        silent = copy.deepcopy(self.model.projection)
        # Without a residual connection the last layer decides, with one the gain.
        for parameter in (silent.outer.weight, silent.outer.bias, silent.gain):
            nn.init.zeros_(parameter)
        model = self.model
        zeros = RefragModel(model.encoder, silent, model.decoder, model.tokenizer, model.rates).eval()
        return zeros.at_rate(model.rate)

    def learn_relevance(self, questions: Sequence[Question], wanted: Sequence[Reading]) -> None:
        """Embed together what will be asked for of these questions' passages."""
        if self.relevance:
            most = max((reading.passages for reading in wanted), default=0)
            asked = [question for question in questions if question.question]
            self.relevance.learn(
                [question.question for question in asked],
                [passage for question in asked for passage in question.take(most)],
            )

    def arranged(self, question: Question, passages: Sequence[Passage]) -> list[Passage]:
        """Passages in the order in which they are read for this question; a summary's stay as they are listed.

        Raises:
            RefragError: the order is `nearest`, and there is no retriever.
        """
        if self.order == "shuffled":
            return random.Random(f"order {self.seed} {question.id}").sample(passages, len(passages))
        if self.order == "listed" or not question.question:
            return list(passages)
        if self.relevance is None:
            raise RefragError("the order `nearest` needs a retriever, and there is none; read passages as `listed`")
        near = self.relevance.of(question.question, passages)
        return [passages[number] for number in sorted(range(len(passages)), key=lambda number: -near[number])]


@dataclass(frozen=True)
class Context:
    """A question's passages, in the order in which they are read: as they are, and cut into chunks with vectors."""

    tokenizer: PreTrainedTokenizerFast
    passages: list[Passage]
    chunks: list[Chunks]

    @cached_property
    def texts(self) -> list[list[int]]:
        """The tokens of each passage."""
        return [unchunk(chunks.token_ids) for chunks in self.chunks]

    @cached_property
    def tokens(self) -> list[int]:
        """The tokens of all passages."""
        return [token for text in self.texts for token in text]

    @cached_property
    def sentences(self) -> list[tuple[list[int], list[Sentence]]]:
        """The title's tokens and the sentences of each passage."""
        return [split_passage(self.tokenizer, number, *passage) for number, passage in enumerate(self.passages)]


def prompts(
    readers: Readers, question: Question, wrong: Question | None, wanted: Sequence[Reading], generator: torch.Generator
) -> Iterator[tuple[Reading, Prompt, int]]:
    """The prompt of each reading, with its length in tokens if the passages were whole.

    Without `wrong` there is none of the systems that read another question's passages or vectors.
    """
    model = readers.model
    most = max((reading.passages for reading in wanted), default=0)
    encoded = _encoded(readers, question, question.take(most))
    strange: dict[Passage, Chunks] = {}
    if wrong and any(reading.system in {"refrag_wrong", "kept+other"} for reading in wanted):
        strange = _encoded(readers, question, wrong.take(most))
    asked = content_ids(model.tokenizer, question.question)

    def context(of: Question, encoded: Mapping[Passage, Chunks], count: int) -> Context:
        passages = readers.arranged(question, of.take(count))
        return Context(model.tokenizer, passages, [encoded[passage] for passage in passages])

    def expanded(chunks: Sequence[Chunks], share: float) -> list[Chunks]:
        return expand(model, chunks, share, readers.policy, generator, asked)

    contexts: dict[int, Context] = {}
    kept: dict[tuple[int, float], list[Chunks]] = {}
    for reading in wanted:
        count, share, system = reading.passages, reading.at, reading.system
        if count not in contexts:
            contexts[count] = context(question, encoded, count)
        shown = contexts[count]
        whole = prompt_length(question_prompt(model, question, [Text(shown.tokens)]))
        if system == "untuned":
            yield reading, _template_prompt(readers.of(system), question, shown.passages), whole
            continue
        if system == "refrag_wrong":
            if wrong is not None and share is not None:
                read = question_prompt(model, question, expanded(context(wrong, strange, count).chunks, share))
                # Another question's passages are as long as they are.
                yield reading, read, len(plain_tokens(read))
            continue
        refrag: list[Chunks] = []
        if share is not None:
            if (count, share) not in kept:
                kept[count, share] = expanded(shown.chunks, share)
            refrag = kept[count, share]
        if system == "kept+other":
            vectors = [part.vectors for part in (strange[passage] for passage in wrong.take(count))] if wrong else []
            if not any(len(part) for part in vectors if part is not None):
                continue
            refrag = _with_others(refrag, [part for part in vectors if part is not None])
        yield (
            reading,
            question_prompt(model, question, passages_read(readers, question, system, shown, refrag)),
            whole,
        )


def passages_read(
    readers: Readers, question: Question, system: System, context: Context, refrag: list[Chunks]
) -> Sequence[Chunks | Text]:
    """What a system lets the decoder read in the place of the passages; `refrag`: what REFRAG reads there."""
    budget = prompt_length(refrag)
    match system:
        case "none":
            return []
        case "full":
            return [Text(context.tokens)]
        case "first":
            return [Text(context.texts[0])] if context.texts else []
        case "truncated":
            return [Text(context.tokens[-budget:] if budget else [])]
        case "plain":
            return [Text(context.tokens[:budget])]
        case "pruned":
            return [Text(pruned(readers.of(system), context.texts, budget))]
        case "sentences":
            return [Text(_sentences(readers, question, context, budget))]
        case "kept":
            return [Text([token for part in refrag for token in unchunk(part.token_ids[part.keep])])]
        case "rule":
            return _first_kept(context.chunks, budget)
        case _:
            return refrag


def _sentences(readers: Readers, question: Question, context: Context, budget: int) -> list[int]:
    if readers.relevance is None:
        raise RefragError("the system `sentences` needs a retriever, and there is none")
    return nearest_sentences(context.sentences, readers.relevance, question.question, context.passages, budget)


def _first_kept(passages: Sequence[Chunks], budget: int) -> list[Chunks]:
    """The passages with chunks kept from the first one's start on, as many as take no more than `budget` positions."""
    room = budget - sum(len(part.token_ids) for part in passages)
    parts = []
    for part in passages:
        # A chunk kept takes its tokens' positions in the place of its vector's.
        cost = ((part.token_ids != PAD).sum(1) - 1).cumsum(0)
        parts.append(part.kept(cost <= room))
        if not bool(parts[-1].keep.all()):
            room = -1
        elif len(cost):
            room -= int(cost[-1])
    return parts


def _with_others(passages: Sequence[Chunks], vectors: Sequence[torch.Tensor]) -> list[Chunks]:
    """The passages with other vectors: those given, one after another, and from the first again where they end."""
    others = torch.cat(list(vectors))
    counts = [len(part.token_ids) for part in passages]
    drawn = others[torch.arange(sum(counts), device=others.device) % len(others)].split(counts)
    return [replace(part, vectors=other) for part, other in zip(passages, drawn, strict=True)]


def other_question(questions: Sequence[Question], number: int) -> Question | None:
    """The next question whose passages can't hold this one's answer: none of its gold ones, or of all if unknown."""
    asked = questions[number]
    gold_passages = {asked.passages[gold] for gold in asked.gold} or set(asked.passages)
    for step in range(1, len(questions)):
        other = questions[(number + step) % len(questions)]
        if other.passages and gold_passages.isdisjoint(other.passages):
            return other
    return None


@torch.inference_mode()
def _encoded(readers: Readers, question: Question, passages: Sequence[Passage]) -> dict[Passage, Chunks]:
    """Each passage cut into chunks with their vectors, none of them kept as tokens."""
    if question in readers.stored:
        return {passage: readers.stored[question][passage] for passage in passages}
    model = readers.model
    cut = [passage_chunks(model.tokenizer, title, text, model.chunk_size) for title, text in passages]
    if readers.relevance and readers.told and question.question:
        cut = readers.relevance.tell(question.question, passages, cut)
    return dict(zip(passages, model.with_vectors(cut), strict=True))


def question_prompt(model: RefragModel, question: Question, passages: Sequence[Chunks | Text]) -> Prompt:
    """The prompt of every decoder that is trained here."""
    return rag_prompt(model.tokenizer, question.question, passages, as_turns(question.history), question.kind)


def _template_prompt(reader: RefragModel, question: Question, passages: Sequence[Passage]) -> Prompt:
    """The same request in the words of the decoder's own chat template."""
    tokenizer = reader.tokenizer
    if not tokenizer.chat_template:
        raise RefragError("the system `untuned` needs a chat template, and the decoder's tokenizer has none")
    shown = "\n".join(passage_text(title, text) for title, text in passages)
    asked = [shown, INSTRUCTIONS[question.kind], question.question]
    said = [{"role": role, "content": words} for role, words in question.history]
    said.append({"role": "user", "content": "\n\n".join(part for part in asked if part)})
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return [Text(tokenizer(text, add_special_tokens=False)["input_ids"])]
