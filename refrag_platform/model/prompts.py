"""The prompts of fine-tuning, evaluation and serving: written once, so that they are the same everywhere.

Passages come first and the question last, in the decoder's chat format: what a conversation shares stays
a stable prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from transformers import PreTrainedTokenizerFast

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


def passage_text(title: str, text: str) -> str:
    """The text of a passage that is chunked and encoded."""
    return f"{title}\n{text}\n" if title else f"{text}\n"


def passage_chunks(tokenizer: PreTrainedTokenizerFast, title: str, text: str, chunk_size: int) -> Chunks:
    """A passage cut into chunks, none of them expanded, without vectors."""
    ids = tokenizer(passage_text(title, text), add_special_tokens=False)["input_ids"]
    return Chunks(chunk_tokens(ids, chunk_size))


def rag_prompt(
    tokenizer: PreTrainedTokenizerFast,
    question: str,
    passages: Sequence[Chunks],
    history: Sequence[Turn] = (),
    instruction: Literal["answer", "summary"] = "answer",
) -> Prompt:
    """Passages, earlier turns and the question, ending where the answer begins.

    The text around the passages is the decoder's chat format; a passage's chunks stand between its parts.
    """

    def text(string: str) -> Text:
        return Text(tokenizer(string, add_special_tokens=False)["input_ids"])

    system = "\n".join([turn["content"] for turn in history if turn["role"] == "system"] or [INSTRUCTIONS[instruction]])
    turns = "".join(f"{START}{turn['role']}\n{turn['content']}{END}\n" for turn in history if turn["role"] != "system")
    asked = f"{START}user\n{question}{END}\n" if question else ""
    opening = text(f"{START}system\n{system}\n")
    return [opening, *passages, text(f"{END}\n{turns}{asked}{START}assistant\n")]


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids that end an answer."""
    ids = {
        tokenizer.eos_token_id,
        *(tokenizer.convert_tokens_to_ids(token) for token in (END, "<|endoftext|>")),
    }
    return {token for token in ids if token is not None and token != tokenizer.unk_token_id}
