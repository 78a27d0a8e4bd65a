"""Batches of contexts with questions over them (reading/loss.py has how a model reads them).

A context stands once in a sequence, its chunks as vectors or as tokens, and behind it blocks of equal length, each a
question in the decoder's chat format with its answer. A block sees the context and itself (model/packed.py). What is
asked are blanks (reading/blanks.py), and quotes: some tokens of a passage, to be continued.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from refrag_platform.errors import RecipeError
from refrag_platform.model.prompts import content_ids, contents_ids, end_of_turn, question_frame
from refrag_platform.model.segments import PAD, Chunks, Prompt, Text, chunk_tokens, lay_slots, window_numbers
from refrag_platform.recipes import ReadingRecipe
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.kept import kept_at_random, step_rate
from refrag_platform.training.reading.blanks import QuestionAnswer, blank
from refrag_platform.training.reading.contexts import DocumentContexts, ReadingContext, TokenizedPassage
from refrag_platform.training.reading.questions import QuestionContexts

# What a decoder finds in its context: its vectors and the chunks kept, all tokens, or nothing.
ContextForm = Literal["refrag", "full", "none"]
CONTINUE = "Continue:"
# Tokens of a passage that a quote shows and, at most, those that continue it.
LEAST_QUOTED, MOST_QUOTED, MOST_CONTINUED = 4, 8, 22
MOST_ANSWER = 20
# Tokens of the shortest question and answer.
LEAST_ROOM = 16
# Draws for each question wanted, at most: a sentence may hold nothing to ask for.
DRAWS_PER_QUESTION = 4


class Block(NamedTuple):
    """A question with its answer: token ids, where the answer begins, and whether it continues a quote."""

    token_ids: list[int]
    answer: int
    is_quote: bool


class ReadingBatches:
    """The batches of a training, decided by the seed, the step and the row alone."""

    def __init__(
        self,
        contexts: DocumentContexts,
        tokenizer: PreTrainedTokenizerFast,
        settings: ReadingRecipe,
        chunks: int,
        chunk_size: int,
        window_chunks: int,
        seed: int,
        questions: QuestionContexts | None = None,
        rates: Sequence[int] = (1,),
    ) -> None:
        """
        Args:
            chunks: of a context, at most. chunk_size: k. window_chunks: most that the encoder reads together.
            questions: where some of the contexts come with questions. rates: numbers of chunks that are read as one.

        Raises:
            RecipeError: blocks are too short for the chat format and a question.
        """
        self.settings, self._contexts, self._tokenizer, self._seed = settings, contexts, tokenizer, seed
        self._questions, self._rates = questions, rates
        self._chunks, self._chunk_size, self._window_chunks = chunks, chunk_size, window_chunks
        self._opening, self._before, self._after = question_frame(tokenizer)
        self._continue, self._end = content_ids(tokenizer, CONTINUE), end_of_turn(tokenizer)
        self._room = settings.block_tokens - len(self._before) - len(self._after) - 1
        if self._room < LEAST_ROOM:
            raise RecipeError(
                f"cpt.reading.block_tokens is {settings.block_tokens}: beside the {settings.block_tokens - self._room} "
                f"of the chat format it leaves {self._room} for a question and its answer; make it "
                f"{settings.block_tokens - self._room + LEAST_ROOM} at least"
            )

    def _most_kept(self, rate: int) -> int:
        return math.ceil(self.settings.most_share_kept * (self._chunks // rate))

    def context_positions(self, seen: ContextForm, any_kept: bool, rate: int) -> int:
        """Positions of a context at most, the same for all rows of a batch."""
        chunks, k = self._chunks // rate, self._chunk_size * rate
        kept = self._most_kept(rate) * (k - 1) if any_kept else 0
        return len(self._opening) + {"refrag": chunks + kept, "full": chunks * k, "none": 0}[seen]

    def batch(self, step: int, micro: int, size: int, rank: int, world: int, seen: ContextForm = "refrag") -> Batch:
        """This rank's rows of a micro-batch of `size` contexts.

        chunks [B, L, k]: token ids, -1 where there are none; at rate m of the step L is m times as small, and k as
        large. windows [B, L m]: the number in its row of the window of each of the encoder's chunks, -1 for padding.
        slots, owners [B, S] and keep [B, L]: as `pack_slots` reads them; length: of its rows. blocks [B, n, o]: token
        ids. answers, quotes: places of their tokens among all B n o.
        """
        rows = range(rank * size // world, (rank + 1) * size // world)
        chances = [np.random.default_rng([self._seed, 5, step, micro, row]) for row in rows]
        rate, kept = self.rate_and_kept(step)
        drawn = [self._draw(chance, rate) for chance in chances]
        batch = self._contexts_batch([context.passages for context in drawn], chances, kept, seen, rate)
        blocks = [self.blocks(context, chance) for context, chance in zip(drawn, chances, strict=True)]
        return batch | self._blocks_batch(blocks)

    def rate_and_kept(self, step: int) -> tuple[int, int]:
        """The rate of all rows of a step, and the chunks that each keeps: some in all, or none, as of one length."""
        rate = step_rate(self._rates, self._seed, step, self.settings.first_rate_share)
        chance = np.random.default_rng([self._seed, 6, step])
        any_kept = chance.random() < self.settings.kept_steps_share
        return rate, int(chance.integers(1, self._most_kept(rate) + 1)) if any_kept else 0

    def _draw(self, chance: np.random.Generator, rate: int) -> ReadingContext:
        if self._questions and chance.random() < self.settings.questions_share:
            return self._questions.draw(chance, rate)
        return self._contexts.draw(chance, rate)

    def blocks(self, context: ReadingContext, chance: np.random.Generator) -> list[Block]:
        """Questions over a context, as many as a sequence has or as are found.

        Those that it comes with take half of them at most, but one at least.
        """
        wanted = self.settings.blocks
        asked: list[QuestionAnswer] = context.questions[: max(1, wanted // 2)]
        quotes: list[Block] = []
        for _ in range(DRAWS_PER_QUESTION * wanted if context.passages else 0):
            if len(asked) + len(quotes) >= wanted:
                break
            passage = context.passages[int(chance.integers(len(context.passages)))]
            if chance.random() < self.settings.quotes_share:
                quotes += self._quote(passage, chance)
            elif one := blank(passage.text, chance):
                asked.append(one)
        ids = contents_ids(self._tokenizer, [text for one in asked for text in one])
        answered = (self._block(q, a, is_quote=False) for q, a in zip(ids[::2], ids[1::2], strict=True))
        return [*quotes, *(block for block in answered if block)]

    def _quote(self, passage: TokenizedPassage, chance: np.random.Generator) -> list[Block]:
        ids, size = passage.token_ids, int(chance.integers(LEAST_QUOTED, MOST_QUOTED + 1))
        if len(ids) < 2 * MOST_QUOTED:
            return []
        start = int(chance.integers(len(ids) - size - MOST_QUOTED + 1))
        end = start + size
        room = self._room - len(self._continue) - size
        block = self._block([*self._continue, *ids[start:end]], ids[end : end + min(room, MOST_CONTINUED)], True)
        return [block] if block else []

    def _block(self, question: list[int], answer: list[int], is_quote: bool) -> Block | None:
        """None where it doesn't fit; of a long answer the beginning is asked for."""
        answer, whole = answer[:MOST_ANSWER] if not is_quote else answer, len(answer) <= MOST_ANSWER
        if not answer or len(question) + len(answer) > self._room:
            return None
        asked = [*self._before, *question, *self._after]
        return Block([*asked, *answer, *([self._end] if whole and not is_quote else [])], len(asked), is_quote)

    def _contexts_batch(
        self,
        drawn: Sequence[Sequence[TokenizedPassage]],
        chances: Sequence[np.random.Generator],
        kept: int,
        seen: ContextForm,
        rate: int,
    ) -> Batch:
        k = self._chunk_size * rate
        prompts: list[Prompt] = [
            [Text(self._opening), *(Chunks(chunk_tokens(passage.token_ids, k)) for passage in passages)]
            for passages in drawn
        ]
        slots, owners, chunks, keep = lay_slots(prompts, k, self._chunks // rate)
        windows = torch.full((len(keep), keep.shape[1] * rate), -1)
        for row, passages in enumerate(drawn):
            place, number = 0, 0
            for passage in passages:
                numbers = number + window_numbers(-(-len(passage.token_ids) // self._chunk_size), self._window_chunks)
                windows[row, place : place + len(numbers)] = numbers
                # The next passage begins a chunk of its own.
                place += -(-len(numbers) // rate) * rate
                number = int(numbers[-1]) + 1
        real = chunks[..., 0] != PAD
        if seen == "full":
            keep = real
        elif seen == "none":
            slots, owners = slots[:, : len(self._opening)], owners[:, : len(self._opening)]
        elif kept:
            for row, chance in enumerate(chances):
                count = int(real[row].sum())
                keep[row, kept_at_random(count, min(kept, count), chance)] = True
        return {
            "chunks": chunks,
            "windows": windows,
            "slots": slots,
            "owners": owners,
            "keep": keep,
            "length": self.context_positions(seen, bool(kept), rate),
        }

    def _blocks_batch(self, drawn: Sequence[Sequence[Block]]) -> Batch:
        number, size = self.settings.blocks, self.settings.block_tokens
        ids = np.zeros((len(drawn), number, size), dtype=np.int64)
        judged: dict[bool, list[int]] = {False: [], True: []}
        for row, blocks in enumerate(drawn):
            for place, block in enumerate(blocks):
                ids[row, place, : len(block.token_ids)] = block.token_ids
                first = (row * number + place) * size
                judged[block.is_quote] += range(first + block.answer, first + len(block.token_ids))
        return {
            "blocks": torch.from_numpy(ids),
            "answers": torch.tensor(judged[False], dtype=torch.long),
            "quotes": torch.tensor(judged[True], dtype=torch.long),
        }
