"""The training of a writer: to a sentence of a passage, the answer and the question that people asked about it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from refrag_platform.corpus.passages import sentences
from refrag_platform.corpus.question import Passage, Question
from refrag_platform.errors import RefragError
from refrag_platform.files import whole
from refrag_platform.model.decoder import decoder_states, head_weight, in_dtype
from refrag_platform.model.families import require_positions
from refrag_platform.recipes import Recipe, TrainsDecoder
from refrag_platform.training.core.batch import Batch, share
from refrag_platform.training.core.loop import Task, train
from refrag_platform.training.core.losses import linear_cross_entropy
from refrag_platform.training.reading.blanks import QuestionAnswer
from refrag_platform.training.usable import LeftOut
from refrag_platform.training.writing.filters import answer_missing
from refrag_platform.training.writing.layout import Shown, WriterLayout
from refrag_platform.training.writing.models import save_text_model
from refrag_platform.weights import load_decoder, load_tokenizer

LONGEST_ANSWER = 80
BATCH, LEARNING_RATE = 96, 2e-4
# Sequences of a batch are about as long as each other: by so many tokens at random.
LENGTHS_MIXED = 32


class WriterExample(NamedTuple):
    """Token ids: what a writer reads, and what it writes."""

    prompt: list[int]
    written: list[int]


def writer_settings(recipe: Recipe, steps: int) -> TrainsDecoder:
    """All weights of the decoder are trained, on BATCH questions a step, in the precision of the recipe's cpt."""
    precision = recipe.cpt.precision
    return TrainsDecoder(steps=steps, batch_size=BATCH, decoder_learning_rate=LEARNING_RATE, precision=precision)


def examples(questions: Sequence[Question], layout: WriterLayout) -> list[WriterExample]:
    """What can be learned from labelled questions; those that nothing is learned from are counted, and said.

    Raises:
        RefragError: it is nothing.
    """
    left_out = LeftOut("the writer")
    plain = [one for one in questions if _is_plain(one)]
    left_out.add("without an answer of one passage, or in a conversation", len(questions) - len(plain))
    passages = list(dict.fromkeys(_gold(one) for one in plain))
    shown = dict(zip(passages, layout.shown(passages), strict=True))
    about = [_sentence(one, shown[_gold(one)]) for one in plain]
    learned = [(one, sentence) for one, sentence in zip(plain, about, strict=True) if sentence]
    left_out.add("whose answer is long, or in no sentence of what is shown", len(plain) - len(learned))
    left_out.say("questions", len(learned))
    if not learned:
        raise RefragError(
            f"no question to learn writing from ({left_out or 'there are none'}); name files of labelled questions by "
            "--questions, each with an answer that stands in its gold passage"
        )
    prompts = layout.prompts([sentence for _, sentence in learned])
    return [
        WriterExample(
            [*shown[_gold(one)].token_ids, *prompt], layout.written(QuestionAnswer(one.question, one.answers[0]))
        )
        for (one, _), prompt in zip(learned, prompts, strict=True)
    ]


def _is_plain(question: Question) -> bool:
    about_one = len(question.gold) == 1 and not question.closed
    return question.kind == "answer" and bool(question.answers) and about_one and not question.history


def _gold(question: Question) -> Passage:
    return question.passages[question.gold[0]]


def _sentence(question: Question, shown: Shown) -> str | None:
    """Of the sentences with the answer the one that shares most words with the question."""
    asked = QuestionAnswer(question.question, question.answers[0])
    holding = [one for one in sentences(shown.passage[1]) if not answer_missing(asked, ("", one))]
    if not holding or len(asked.answer) > LONGEST_ANSWER:
        return None
    words = _words(question.question)
    return max(holding, key=lambda sentence: len(words & _words(sentence)))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


class WriterTask(Task):
    """The loss of what is written, given what is read."""

    def __init__(
        self, decoder: PreTrainedModel, learned: Sequence[WriterExample], settings: TrainsDecoder, seed: int
    ) -> None:
        """
        Raises:
            RecipeError: the decoder reads fewer positions than an example has.
        """
        super().__init__()
        self.decoder, self._examples, self._settings, self._seed = decoder, learned, settings, seed
        self._lengths = np.array([len(one.prompt) + len(one.written) for one in learned])
        require_positions(decoder, int(self._lengths.max()), "choose another decoder")

    def batch(self, step: int, micro: int, size: int, rank: int, world: int) -> Batch:
        """token_ids [B, N], padded to the right; labels [n], and the places among all B N that predict them."""
        rows = self._numbers(step)[micro * size :][rank * size // world : (rank + 1) * size // world]
        chosen = [self._examples[number] for number in rows]
        length = int(self._lengths[rows].max())
        token_ids = torch.zeros(len(chosen), length, dtype=torch.long)
        places: list[int] = []
        for row, (prompt, written) in enumerate(chosen):
            token_ids[row, : len(prompt) + len(written)] = torch.tensor([*prompt, *written])
            first = row * length + len(prompt) - 1
            places += range(first, first + len(written))
        labels = [token for one in chosen for token in one.written]
        return {"token_ids": token_ids, "labels": torch.tensor(labels), "places": torch.tensor(places)}

    def _numbers(self, step: int) -> np.ndarray:
        """The examples of a step: every one comes once in an epoch, in a batch of others that are about as long."""
        size = self._settings.batch_size
        steps = -(-len(self._examples) // size)
        chance = np.random.default_rng([self._seed, step // steps])
        order = np.argsort(self._lengths + chance.uniform(0, LENGTHS_MIXED, len(self._lengths)))
        return chance.permutation(np.resize(order, (steps, size)))[step % steps]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        # Padding stands to the right, where nothing that counts can see it: no mask is needed.
        states = decoder_states(self.decoder, self.decoder.get_input_embeddings()(batch["token_ids"]))
        predicting = states.flatten(0, 1)[batch["places"]]
        loss = linear_cross_entropy(predicting, head_weight(self.decoder), batch["labels"], compiled=False)
        return share(batch) * loss, {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        rate = self._settings.decoder_learning_rate
        return [{"name": "decoder", "params": list(self.decoder.parameters()), "lr": rate}]

    def counts(self, batch: Batch) -> list[int]:
        return [len(batch["labels"])]

    def positions(self, batch: Batch) -> int:
        return batch["token_ids"].numel()


def train_writer(
    recipe: Recipe, base: Path, questions: Sequence[Question], settings: TrainsDecoder, seed: int, work: Path, out: Path
) -> None:
    """Train the recipe's decoder to write, and make the new folder `out` of it.

    Args: base: the recipe's folder. work: holds checkpoints, from which a stopped training goes on; gone when it ends.

    Raises:
        TrainingInterrupted: a signal came; the state is saved. RefragError: as `examples`.
    """
    decoder, tokenizer = load_decoder(recipe.decoder, base, recipe.seed), load_tokenizer(recipe.decoder, base)
    task = WriterTask(decoder, examples(questions, WriterLayout(tokenizer)), settings, seed)
    train(task, settings, work, "writer")
    in_dtype(decoder, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    with whole(out) as folder:
        save_text_model(decoder, tokenizer, folder)
    shutil.rmtree(work)
