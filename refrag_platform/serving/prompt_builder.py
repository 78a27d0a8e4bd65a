"""What the decoder is given of a conversation and its passages: chunks, which of them stay tokens, and the prompt."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

from transformers import PreTrainedTokenizerFast

from refrag_platform.model.loading import Bundle
from refrag_platform.model.prompts import Turn, content_ids, contents_ids, passage_chunks, rag_prompt
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Prompt, Text
from refrag_platform.recipes import ServingRecipe
from refrag_platform.serving.citations import chunk_spans, citation
from refrag_platform.serving.contract import Citation, Message, ServedPassage
from refrag_platform.serving.fitting import require_positions
from refrag_platform.serving.selecting import Expand, Selected, choose, wanted_chunks, with_relevance
from refrag_platform.store.retriever import Retriever


class PromptBuilder:
    """Builds prompts of one model, at any of its rates. Safe to share between threads.

    Args: name: of the model, for errors. retriever: tells a policy how near passages are; None: nobody does.
    """

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerFast, settings: ServingRecipe, retriever: Retriever | None
    ) -> None:
        self._name, self._tokenizer, self._settings, self._retriever = name, tokenizer, settings, retriever
        # A tokenizer keeps state while it reads text, so one thread at a time.
        self._reading = threading.Lock()

    def count_tokens(self, texts: Sequence[str]) -> int:
        """The length of all texts together."""
        with self._reading:
            return sum(map(len, contents_ids(self._tokenizer, list(texts))))

    def prompt(
        self, model: RefragModel, messages: Sequence[Message], chunks: Sequence[Chunks], continues: bool
    ) -> Prompt:
        """The prompt of a conversation over passages, or of a text that is continued."""
        last = messages[-1].content
        with self._reading:
            if continues:
                # As in continual pre-training: the context compressed, then the text (REFRAG, section 2.2).
                return [Text([model.start_token_id]), *chunks, Text(content_ids(self._tokenizer, last))]
            history = [Turn(role=message.role, content=message.content) for message in messages[:-1]]
            return rag_prompt(self._tokenizer, last, chunks, history)

    def select(
        self,
        bundle: Bundle,
        passages: Sequence[ServedPassage],
        share: float,
        question: str,
        expand: Expand = MappingProxyType({}),
    ) -> list[Selected]:
        """The passages as chunks, some of them kept as tokens.

        Raises:
            BadRequest: they take too many positions, or there is no such chunk as is wanted.
        """
        chunks = [self.chunks(bundle.model, passage) for passage in passages]
        # One position each at the least: what can't fit is not encoded.
        require_positions(self._name, chunks, self._settings, "the passages take")
        wanted = wanted_chunks(expand, passages, [len(part.token_ids) for part in chunks])
        if not passages:
            return []
        told = with_relevance(bundle, self._retriever, passages, share, question)
        chunks = [replace(part, relevance=one.score) for part, one in zip(chunks, told, strict=True)]
        with self._reading:
            asked = content_ids(self._tokenizer, question)
        return choose(bundle, chunks, share, asked, wanted)

    def cited(self, model: RefragModel, passage: ServedPassage, selected: Selected) -> Citation:
        """A passage with its chunks' places in the text, for which it is tokenized again."""
        with self._reading:
            spans = chunk_spans(self._tokenizer, passage.title, passage.text, model.chunk_size)
        return citation(passage, selected, spans)

    def chunks(self, model: RefragModel, passage: ServedPassage) -> Chunks:
        """A passage as chunks, with the store's vectors or, for the encoder to make, without."""
        if passage.token_ids is not None and passage.vectors is not None:
            return Chunks(passage.token_ids, vectors=passage.vectors).at_rate(model.rate)
        with self._reading:
            return passage_chunks(self._tokenizer, passage.title, passage.text, model.chunk_size)


def asked_last(messages: Sequence[Message]) -> tuple[str, str]:
    """What the user asked last, and said before it.

    The assistant's answers would lead a search to their own subject, and a tool's results are no question.
    """
    said = [message.content for message in messages if message.role == "user" and not message.is_result]
    if not messages[-1].is_result or not said:
        said = [*said[:-1], messages[-1].content]
    return said[-1], "\n".join(said[:-1])
