"""The systems of a table of questions: what each lets a decoder read, and which decoder reads it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

System = Literal[
    "full", "none", "untuned", "truncated", "first", "plain", "sentences", "pruned", "kept",
    "kept+zero", "kept+other", "rule", "refrag", "refrag_wrong",
]  # fmt: skip
SYSTEMS: tuple[System, ...] = get_args(System)
# What the evaluation stage answers by; its checks ask for these. Of equal decoder tokens they are the nearest text, not
# `truncated`: with the nearest passage first, the last tokens are the farthest text.
STAGE_SYSTEMS: tuple[System, ...] = ("full", "none", "first", "plain", "sentences", "refrag", "refrag_wrong")
# What answers over the passages that the store's search finds.
RETRIEVAL_SYSTEMS: tuple[System, ...] = ("full", "first", "plain", "sentences", "refrag")
# What a table of questions shows unless told otherwise: REFRAG beside every baseline that a sceptic would ask for.
TABLE_SYSTEMS: tuple[System, ...] = (
    "full", "none", "untuned", "first", "plain", "sentences", "kept", "kept+zero", "kept+other", "rule", "refrag",
)  # fmt: skip

EXPLAINED: dict[System, str] = {
    "full": "all passages as text",
    "none": "the question alone",
    "untuned": "all passages as text, by the decoder before any training here, asked in its own chat template",
    "truncated": "the last tokens of the passages, as many as REFRAG's passages take positions",
    "first": "the first passage alone, whole, whatever it takes",
    "plain": "the first tokens of the passages, as many as REFRAG's take positions",
    "sentences": "the sentences that the retriever finds nearest to the question, back in the order of the text, as "
    "many tokens as REFRAG's passages take positions; a passage's title comes with its first one",
    "pruned": "the tokens of most self-information of all passages, as many as REFRAG's take positions",
    "kept": "the chunks that REFRAG keeps as text, and nothing in place of the rest: fewer tokens",
    "kept+zero": "the chunks that REFRAG keeps as text, and zeros in place of the other chunks' vectors",
    "kept+other": "the chunks that REFRAG keeps as text, and another question's vectors in place of the others'",
    "rule": "like REFRAG, but the first chunks of the first passage are kept as text, up to REFRAG's positions",
    "refrag": "a vector for each chunk, but for the share p of them that the policy keeps as text",
    "refrag_wrong": "the same of another question's passages",
}

# Vectors are read by REFRAG's own decoder alone.
VECTOR_SYSTEMS: frozenset[System] = frozenset({"kept+zero", "kept+other", "rule", "refrag", "refrag_wrong"})
# Those whose kept chunks are chosen: by the policy, or by chance where a model has none.
CHOOSING_SYSTEMS: frozenset[System] = frozenset({"kept", "kept+zero", "kept+other", "refrag", "refrag_wrong"})
# Parts of the passages as text: where no control was trained for such a part, one for whole passages can read it.
PARTS: tuple[System, ...] = ("first", "plain", "sentences", "pruned", "kept")
# What a control may be trained for: any plain text.
CONTROL_KINDS: tuple[System, ...] = ("full", "none", "truncated", *PARTS)

# Which order passages are read in. nearest: by the retriever, as the policy is told. listed: as the file lists them.
Order = Literal["nearest", "listed", "shuffled"]

# Who read a row. tuned: a control trained for just that. tuned for full: one for whole passages, which are cut here.
# own decoder: the model's, fine-tuned for REFRAG. untuned: the recipe's, before any training here.
Decoder = Literal["tuned", "tuned for full", "own decoder", "untuned"]


@dataclass(frozen=True)
class Reading:
    """A system at a number of passages; `at`: the share p that fixes how many tokens it reads, where one does."""

    system: System
    passages: int
    at: float | None = None


def readings(systems: Sequence[System], passages: Sequence[int], shares: Sequence[float]) -> list[Reading]:
    """All that is asked for: one row each. The first share is the one that refrag_wrong is read at."""
    wanted = [Reading("none", 0)] if "none" in systems else []
    for count in passages:
        for system in systems:
            if system in {"full", "untuned", "first"}:
                wanted.append(Reading(system, count))
            elif system == "refrag_wrong":
                wanted.append(Reading(system, count, shares[0]))
            elif system != "none":
                wanted += [Reading(system, count, share) for share in shares]
    return wanted


def control_of(system: System, controls: Collection[System]) -> System | None:
    """The kind of the tuned control that reads a system's prompts; None: there is none among those given."""
    if system in VECTOR_SYSTEMS or system == "untuned":
        return None
    if system in controls:
        return system
    return "full" if system in PARTS and "full" in controls else None


def decoder_of(system: System, controls: Collection[System]) -> Decoder:
    """Which decoder reads a system's prompts, as rows name it."""
    if system == "untuned":
        return "untuned"
    control = control_of(system, controls)
    if control is None:
        return "own decoder"
    return "tuned" if control == system else "tuned for full"
