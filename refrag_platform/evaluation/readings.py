"""What each system lets the decoder read of a question and its passages.

| system | reads |
| --- | --- |
| full | all passages as text |
| none | the question alone |
| truncated | the last tokens of the passages |
| plain | the first tokens of the passages: the best ones whole, and the beginning of the next |
| pruned | the tokens of most self-information of all passages |
| refrag | chunk vectors, a share p of the chunks kept as tokens |
| refrag_wrong | the same of another question's passages |
| untuned | all passages as text, by the decoder before any training here, asked in its own chat template |

truncated, plain and pruned have as many tokens as REFRAG's passages take positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from refrag_platform.corpus.question_files import Passage, Question
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.pruning import pruned
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.prompts import INSTRUCTIONS, as_turns, content_ids, passage_chunks, passage_text, rag_prompt
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Prompt, Text, plain_tokens, prompt_length, unchunk
from refrag_platform.model.selection import expand, with_vectors
from refrag_platform.store.relevance import PassageRelevance

System = Literal["full", "none", "truncated", "plain", "pruned", "refrag", "refrag_wrong", "untuned"]
SYSTEMS: tuple[System, ...] = get_args(System)
DEFAULT_SYSTEMS: tuple[System, ...] = ("full", "none", "truncated", "refrag", "refrag_wrong")


@dataclass(frozen=True)
class Reading:
    """A system at a number of passages; `at`: the share p that fixes how many tokens it reads, where one does."""

    system: System
    passages: int
    at: float | None = None


@dataclass(frozen=True)
class Readers:
    """Who answers: the model; for plain text the tuned controls where there are any; the untuned decoder.

    relevance: what the policy is told of the passages, if it reads that.
    """

    model: RefragModel
    policy: PolicyNetwork | None
    controls: Mapping[str, RefragModel]
    untuned: RefragModel | None = None
    relevance: PassageRelevance | None = None

    def of(self, system: System) -> RefragModel:
        """The reader of a system's prompts."""
        if system == "untuned":
            if self.untuned is None:
                raise RefragError("the system `untuned` needs the recipe's decoder, and the recipe isn't known")
            return self.untuned
        # Whoever reads whole passages can read some of them.
        return self.controls.get({"plain": "full", "pruned": "full"}.get(system, system), self.model)

    def learn_relevance(self, questions: Sequence[Question], wanted: Sequence[Reading]) -> None:
        """Embed together what the policy will be told of these questions' passages."""
        if self.relevance:
            most = max((reading.passages for reading in wanted), default=0)
            asked = [question for question in questions if question.question]
            self.relevance.learn(
                [question.question for question in asked],
                [passage for question in asked for passage in question.take(most)],
            )


def readings(systems: Sequence[System], passages: Sequence[int], shares: Sequence[float]) -> list[Reading]:
    """All that is asked for: one row each. The first share is the one that refrag_wrong is read at."""
    found = [Reading("none", 0)] if "none" in systems else []
    for count in passages:
        for system in systems:
            if system in {"full", "untuned"}:
                found.append(Reading(system, count))
            elif system == "refrag_wrong":
                found.append(Reading(system, count, shares[0]))
            elif system != "none":
                found += [Reading(system, count, share) for share in shares]
    return found


def prompts(
    readers: Readers,
    question: Question,
    wrong: Question | None,
    wanted: Sequence[Reading],
    generator: torch.Generator,
) -> Iterator[tuple[Reading, Prompt, int]]:
    """The prompt of each reading, with its length in tokens if the passages were whole; none of refrag_wrong without
    `wrong`."""
    model = readers.model
    most = max((reading.passages for reading in wanted), default=0)
    own, other = _encoded(readers, question, question.take(most)), None
    if wrong and any(reading.system == "refrag_wrong" for reading in wanted):
        other = _encoded(readers, question, wrong.take(most))
    asked = content_ids(model.tokenizer, question.question)
    kept: dict[tuple[int, float], list[Chunks]] = {}
    for reading in wanted:
        passages = [own[passage] for passage in question.take(reading.passages)]
        texts = [unchunk(chunks.token_ids) for chunks in passages]
        tokens = [token for text in texts for token in text]
        full = _prompt(model, question, [Text(tokens)])
        share, read = reading.at, full
        if share is not None and reading.system != "refrag_wrong":
            place = (reading.passages, share)
            if place not in kept:
                kept[place] = expand(model, passages, share, readers.policy, generator, asked)
            positions = prompt_length(kept[place])
        if reading.system == "untuned":
            read = _template_prompt(readers.of("untuned"), question, question.take(reading.passages))
        elif reading.system == "refrag":
            read = _prompt(model, question, kept[place])
        elif reading.system == "refrag_wrong":
            if other is None or wrong is None or share is None:
                continue
            strange = [other[passage] for passage in wrong.take(reading.passages)]
            read = _prompt(model, question, expand(model, strange, share, readers.policy, generator, asked))
        elif reading.system == "truncated":
            read = _prompt(model, question, [Text(tokens[-positions:] if positions else [])])
        elif reading.system == "plain":
            read = _prompt(model, question, [Text(tokens[:positions])])
        elif reading.system == "pruned":
            read = _prompt(model, question, [Text(pruned(readers.of("pruned"), texts, positions))])
        elif reading.system == "none":
            read = _prompt(model, question, [])
        # Another question's passages are as long as they are.
        whole = len(plain_tokens(read)) if reading.system == "refrag_wrong" else prompt_length(full)
        yield reading, read, whole


def other_question(questions: Sequence[Question], number: int) -> Question | None:
    """The next question whose passages can't hold this one's answer: none of its gold ones, or of all if unknown."""
    asked = questions[number]
    own = {asked.passages[gold] for gold in asked.gold} or set(asked.passages)
    for step in range(1, len(questions)):
        other = questions[(number + step) % len(questions)]
        if other.passages and own.isdisjoint(other.passages):
            return other
    return None


@torch.inference_mode()
def _encoded(readers: Readers, question: Question, passages: Sequence[Passage]) -> dict[Passage, Chunks]:
    """Each passage cut into chunks with their vectors, none of them kept as tokens."""
    model = readers.model
    cut = [passage_chunks(model.tokenizer, title, text, model.chunk_size) for title, text in passages]
    if readers.relevance and question.question:
        cut = readers.relevance.tell(question.question, passages, cut)
    return dict(zip(passages, with_vectors(model, cut), strict=True))


def _prompt(model: RefragModel, question: Question, passages: Sequence[Chunks | Text]) -> Prompt:
    return rag_prompt(model.tokenizer, question.question, passages, as_turns(question.history), question.kind)


def _template_prompt(reader: RefragModel, question: Question, passages: Sequence[Passage]) -> Prompt:
    """The same request in the words of the decoder's own chat template."""
    tokenizer = reader.tokenizer
    if not tokenizer.chat_template:
        raise RefragError("the system `untuned` needs a chat template, and the decoder's tokenizer has none")
    given = "\n".join(passage_text(title, text) for title, text in passages)
    asked = [given, INSTRUCTIONS[question.kind], question.question]
    said = [{"role": role, "content": words} for role, words in question.history]
    said.append({"role": "user", "content": "\n\n".join(part for part in asked if part)})
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return [Text(tokenizer(text, add_special_tokens=False)["input_ids"])]
