"""The prompts of fine-tuning, evaluation and serving: written once, so that they are the same everywhere.

Passages come first and the question last, in the decoder's chat format: what a conversation shares stays
a stable prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from transformers import PreTrainedTokenizerFast

from refrag_platform.errors import RefragError
from refrag_platform.model.segments import Chunks, Prompt, Text, chunk_tokens

NO_ANSWER = "The passages do not say."
START, END = "<|im_start|>", "<|im_end|>"
INSTRUCTIONS = {
    "answer": "Answer the question from the passages, as briefly as possible.",
    "summary": "Summarize the document in one sentence.",
}


class Turn(TypedDict):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str


def as_turns(history: Sequence[tuple[str, str]]) -> list[Turn]:
    """Turns (role, text) of a question file as messages; whoever isn't the user is the assistant."""
    return [{"role": "user" if role == "user" else "assistant", "content": text} for role, text in history]


def passage_text(title: str, text: str) -> str:
    """The text of a passage that is chunked and encoded."""
    return f"{title}\n{text}\n" if title else f"{text}\n"


def content_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of text that comes from outside: what looks like a special token in it stays plain text.

    Otherwise a passage or a question could end its turn and speak in another role.
    """
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def contents_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """`content_ids` of many texts at once, which is several times as fast."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []


def passage_chunks(tokenizer: PreTrainedTokenizerFast, title: str, text: str, chunk_size: int) -> Chunks:
    """A passage cut into chunks, none of them expanded, without vectors."""
    return Chunks(chunk_tokens(content_ids(tokenizer, passage_text(title, text)), chunk_size))


def rag_prompt(
    tokenizer: PreTrainedTokenizerFast,
    question: str,
    passages: Sequence[Chunks | Text],
    history: Sequence[Turn] = (),
    instruction: Literal["answer", "summary"] = "answer",
) -> Prompt:
    """Passages, earlier turns and the question, ending where the answer begins.

    The text around the passages is the decoder's chat format; the passages stand between its parts, as chunks or,
    for a decoder that reads all of them, as text.
    """

    def turn(role: str, content: str) -> list[int]:
        return [*_begin(tokenizer, role), *content_ids(tokenizer, content), *ending]

    ending = _ending(tokenizer)
    system = "\n".join(message["content"] for message in history if message["role"] == "system")
    opening = [*_begin(tokenizer, "system"), *content_ids(tokenizer, (system or INSTRUCTIONS[instruction]) + "\n")]
    closing = list(ending)
    for message in history:
        if message["role"] != "system":
            closing += turn(message["role"], message["content"])
    if question:
        closing += turn("user", question)
    return [Text(opening), *passages, Text([*closing, *_begin(tokenizer, "assistant")])]


def question_frame(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int], list[int]]:
    """What stands in `rag_prompt` before the passages, between them and the question, and after the question."""
    ending = _ending(tokenizer)
    (opening, _) = rag_prompt(tokenizer, "", [])
    assert isinstance(opening, Text)
    return opening.token_ids, [*ending, *_begin(tokenizer, "user")], [*ending, *_begin(tokenizer, "assistant")]


def _begin(tokenizer: PreTrainedTokenizerFast, role: str) -> list[int]:
    return tokenizer(f"{START}{role}\n", add_special_tokens=False)["input_ids"]


def _ending(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [end_of_turn(tokenizer), *tokenizer("\n", add_special_tokens=False)["input_ids"]]


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int | None:
    """The id of a special token, None when the vocabulary lacks it (it may well be the unknown token itself)."""
    # Not get_vocab(): it copies the vocabulary, tens of milliseconds in every prompt.
    return tokenizer.backend_tokenizer.token_to_id(token)


def end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that ends a turn: ChatML's token or, where the vocabulary lacks it, the end of sequence.

    Never ordinary pieces of a word: text from outside could spell them, and no answer would end.

    Raises:
        RefragError: the tokenizer has neither.
    """
    for token in (token_id(tokenizer, END), tokenizer.eos_token_id):
        if token is not None:
            return token
    raise RefragError(f"the tokenizer has neither {END} nor an end-of-sequence token, so no answer could end")


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids that end an answer."""
    ids = {tokenizer.eos_token_id, end_of_turn(tokenizer), token_id(tokenizer, "<|endoftext|>")}
    return {token for token in ids if token is not None}
