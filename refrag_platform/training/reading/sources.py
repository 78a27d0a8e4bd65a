"""What a recipe's reading tasks draw from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from refrag_platform.corpus.question import Question
from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.model.families import attention_window, require_positions
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import CptRecipe
from refrag_platform.training.reading.batches import ContextForm, ReadingBatches
from refrag_platform.training.reading.contexts import DocumentContexts
from refrag_platform.training.reading.questions import QuestionContexts, fitting
from refrag_platform.training.reading.renaming import Renaming
from refrag_platform.training.usable import LeftOut, training_questions

# Names to rename by.
SUPPLY = 20_000


def reading_batches(
    model: RefragModel, corpus: Path, settings: CptRecipe, seed: int, seen: ContextForm, root: Path
) -> ReadingBatches:
    """The batches of a recipe that sets `cpt.reading`.

    Args: corpus: its content folder. root: question files are relative to it.

    Raises:
        RecipeError: blocks or the decoder's positions are too short, or the encoder's layers see less than its windows.
        RefragError: the corpus has no text to read, or the files no question with an answer and its passage.
    """
    assert settings.reading is not None
    k, encoder = model.chunk_size, model.encoder
    near = attention_window(encoder.backbone.config)
    if near is not None and encoder.window_chunks * k > near:
        raise RecipeError(
            f"cpt.reading encodes many passages in a row, and the encoder's layers see {near} tokens back; lower "
            f"encoder.window_tokens ({encoder.window_chunks * k}) to that"
        )
    chunks = settings.context_tokens // k
    reading, tokenizer = settings.reading, model.tokenizer
    contexts = DocumentContexts(corpus, tokenizer, chunks, k)
    asked = None
    if reading.questions_share:
        renaming = Renaming(contexts.names(SUPPLY, seed) if reading.renamed_share else ())
        coarsest = model.rates[-1]
        questions = _answered(corpus, reading.questions, root, tokenizer, chunks // coarsest, k * coarsest)
        asked = QuestionContexts(questions, tokenizer, chunks, k, renaming, reading.renamed_share)
    batches = ReadingBatches(contexts, tokenizer, reading, chunks, k, encoder.window_chunks, seed, asked, model.rates)
    require_positions(
        model.decoder,
        max(batches.context_positions(seen, reading.kept_steps_share > 0, rate) for rate in model.rates)
        + settings.reading.block_tokens,
        f"shorten cpt.context_tokens ({settings.context_tokens}) or cpt.reading.block_tokens",
    )
    return batches


def _answered(
    corpus: Path, files: Sequence[str], root: Path, tokenizer: PreTrainedTokenizerFast, chunks: int, chunk_size: int
) -> list[Question]:
    """The corpus' training questions and those of the files with an answer, and passages that hold it and fit.

    Raises:
        RefragError: there are none.
    """
    left_out = LeftOut("cpt.reading")
    questions = [one for one in training_questions(corpus, files, root, left_out) if one.kind == "answer"]
    kept = [one for one in questions if one.answers and one.gold and not one.history]
    left_out.add("without an answer or its passage, or in a conversation", len(questions) - len(kept))
    kept = fitting(kept, tokenizer, chunks, chunk_size, left_out)
    if not kept:
        raise RefragError(
            f"cpt.reading.questions_share is set, and there is nothing to ask ({str(left_out) or 'no questions'}); "
            "name question files in cpt.reading.questions, or set it to 0"
        )
    left_out.say("questions", len(kept))
    return kept
