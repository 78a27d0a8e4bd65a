"""Fine-tuning (section 4): instruction tuning on RAG questions, conversations and summaries.

Projection and decoder train, and where the recipe says so the encoder: whatever reads its vectors, the chunk store and
the policy, comes after. Some prompts have chunks kept as tokens (ours): as a good policy would, those with the answer
first, or any. So the model reads what every policy may keep, and none. Some steps may continue windows of text, as CPT
does (ours). The same task trains the controls, on the same examples: all passages as text, none of them, their last
tokens, or (`plain`) the first tokens of the passages nearest to the question.
Run: `refrag run finetuned --model tiny`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from refrag_platform.corpus.splits import Split
from refrag_platform.model.decoder import decoder_states, head_weight
from refrag_platform.model.families import most_positions, require_positions
from refrag_platform.model.loading import default_device
from refrag_platform.model.prompts import content_ids, contents_ids, end_of_turn, rag_prompt
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import (
    PAD,
    Chunks,
    Prompt,
    Text,
    lay_slots,
    pack_slots,
    pool_vectors,
    prompt_length,
    whole_chunks,
)
from refrag_platform.recipes import FinetunedRecipe, TrainedSystem
from refrag_platform.stages import StageContext
from refrag_platform.store.relevance import PassageRelevance, recipe_relevance
from refrag_platform.training.core.artifact import finish, load_model
from refrag_platform.training.core.batch import Batch, share
from refrag_platform.training.core.groups import decoder_group, encoder_groups
from refrag_platform.training.core.loop import Task, train
from refrag_platform.training.core.lora import prepare_decoder, prepare_encoder
from refrag_platform.training.core.losses import linear_cross_entropy
from refrag_platform.training.core.windows import WindowSampler
from refrag_platform.training.evidence import evidence_levels
from refrag_platform.training.examples import Example, Examples
from refrag_platform.training.kept import kept_at_random, kept_by_evidence, step_rate
from refrag_platform.training.passage_table import ChunkVectors, PassageTable, encoded_rows
from refrag_platform.training.rates import train_at_best_rate
from refrag_platform.training.remembering import RememberingTokenizer

# Prompts are padded to a multiple of this: few lengths reach the GPU's kernels and its allocator.
LENGTH_STEP = 64
# Windows of text that are continued; their vectors, too, are made once.
WINDOWS = 2048
# Of the prompts that keep chunks and whose answer stands in a passage that is known, those that keep its chunks first.
EVIDENT_SHARE = 0.5


@dataclass(frozen=True)
class _Row:
    """One sequence, the answer at its end; rows [L, rate] of its chunks in the table; the answer's ids."""

    prompt: Prompt
    chunks: NDArray[np.int64]
    answer: list[int]


class FinetunedTask(Task):
    """The answers' loss, the passages read as vectors, or by a control as text."""

    def __init__(
        self,
        model: RefragModel,
        settings: FinetunedRecipe,
        examples: Examples,
        system: TrainedSystem = "refrag",
        windows: WindowSampler | None = None,
        relevance: PassageRelevance | None = None,
    ) -> None:
        """
        Args:
            relevance: by which the control `plain` orders the passages; without it they stand as they are drawn.
            windows: of text to continue, each a context and its output; needed where `settings.text_share` asks for it.
        """
        super().__init__()
        self.model, self.settings, self.examples, self.system = model, settings, examples, system
        self.train_encoder = settings.encoder_learning_rate > 0 and system == "refrag"
        if self.train_encoder:
            prepare_encoder(model, settings, examples.seed)
        else:
            model.encoder.requires_grad_(False)
            model.encoder.eval()
        if system != "refrag":
            model.projection.requires_grad_(False)
        prepare_decoder(model, settings, examples.seed)
        self._relevance = relevance
        self._tokenizer = cast(PreTrainedTokenizerFast, RememberingTokenizer(model.tokenizer))
        # Drawn once, as all passages lie in one table.
        self._windows = windows.batch(0, 0, WINDOWS).numpy() if windows else np.empty((0, 0), np.int64)
        contexts = self._windows[:, : settings.context_tokens].astype(np.int32) if windows else None
        self._table = PassageTable(model.tokenizer, examples.passages, model.chunk_size, contexts)
        self._vectors = ChunkVectors(model, self._table, settings.precision)
        self._fit()

    def _fit(self) -> None:
        """Hold what there is to draw against the decoder's positions.

        Raises:
            RecipeError: windows of text are too long. RefragError: nothing fits.
        """
        positions = most_positions(self.model.decoder)
        if positions is None:
            return
        k, share = self.model.chunk_size, self.settings.most_share_kept if self.settings.kept_prompts_share else 0.0

        def cost(chunks: NDArray[np.int64]) -> NDArray[np.int64]:
            """Positions of passages of so many chunks, at the rate that takes most."""
            if self.system in {"full", "none"}:
                return chunks * (k if self.system == "full" else 0)
            read = np.stack([-(-chunks // rate) for rate in self.model.rates])
            sizes = k * np.array(self.model.rates).reshape(-1, *[1] * chunks.ndim)
            return (read + np.ceil(read * share).astype(np.int64) * (sizes - 1)).max(0)

        def lengths(texts: list[str]) -> list[int]:
            return [len(ids) for ids in contents_ids(self.model.tokenizer, texts)]

        if len(self._windows):
            context = int(cost(np.array(self.settings.context_tokens // k)))
            require_positions(
                self.model.decoder,
                1 + context + self.settings.output_tokens,
                "shorten finetuned.context_tokens or finetuned.output_tokens",
            )
        # Before and after a question, and of each turn before it: no more than around a whole prompt.
        frame = prompt_length(rag_prompt(self.model.tokenizer, "?", []))
        passages = self._table.counts[: len(self.examples.passages)]
        self.examples.fit(positions, cost(passages), frame, lengths)

    def batch(self, step: int, micro: int, size: int, rank: int, world: int) -> Batch:
        rows = range(rank * size // world, (rank + 1) * size // world)
        numbers = [micro * size + row for row in rows]
        continues = np.random.default_rng([self.examples.seed, 9, step]).random() < self.settings.text_share
        if self._relevance and not continues:
            self._embed([self.examples.draw(step, number) for number in numbers])
        make = self._text_row if continues else self._row
        sequences = [make(step, number) for number in numbers]
        rate = self._rate(step)
        k = self.model.chunk_size * rate
        slots, owners, chunks, keep = lay_slots([row.prompt for row in sequences], k)
        chunk_rows = np.full((*keep.shape, rate), -1, np.int64)
        for number, row in enumerate(sequences):
            chunk_rows[number, : len(row.chunks)] = row.chunks
        # A kept chunk may be partial, and the prompt shorter than this.
        lengths = ((owners < 0) & (slots != PAD)).sum(1) + (chunks[..., 0] != PAD).sum(1) + keep.sum(1) * (k - 1)
        length = -(-int(lengths.max()) // LENGTH_STEP) * LENGTH_STEP
        token_ids, chunk_index, positions = pack_slots(slots, owners, keep, length)
        answers = [row.answer for row in sequences]
        answer_rows = torch.tensor([row for row, answer in enumerate(answers) for _ in answer])
        to_end = torch.tensor([left for answer in answers for left in range(len(answer), 0, -1)])
        return {
            "token_ids": token_ids,
            "chunk_index": chunk_index,
            "chunk_rows": chunk_rows.reshape(len(keep), -1),
            "answers": torch.tensor([token for answer in answers for token in answer]),
            "predicting": answer_rows * length + positions[answer_rows] - to_end - 1,
        } | ({"rate": rate} if rate > 1 else {})

    def _rate(self, step: int) -> int:
        return step_rate(self.model.rates, self.examples.seed, step)

    def _text_row(self, step: int, row: int) -> _Row:
        """A window of text: after the token that starts one, its context, and what follows as the answer."""
        number = int(np.random.default_rng([self.examples.seed, 10, step, row]).integers(len(self._windows)))
        output = self._windows[number, self.settings.context_tokens :].tolist()
        chunks = self._table.rows([len(self.examples.passages) + number], self._rate(step))
        keep = self._keep(step, row, len(chunks))
        return self._read([self.model.start_token_id], chunks, keep, [], output, from_end=True)

    def _row(self, step: int, row: int) -> _Row:
        tokenizer, example = self._tokenizer, self.examples.draw(step, row)
        kind = "summary" if example.task == "summarization" else "answer"
        before, after = [
            part.token_ids
            for part in rag_prompt(tokenizer, example.question, [], example.history, kind)  # type: ignore[arg-type]
            if isinstance(part, Text)
        ]
        answer = [*content_ids(tokenizer, example.answer), end_of_turn(tokenizer)]
        chunks = self._table.rows(self._ordered(example), self._rate(step))
        return self._read(before, chunks, self._keep(step, row, len(chunks), example), after, answer)

    def _embed(self, examples: Sequence[Example]) -> None:
        """Embed what the passages of these are ordered by, together."""
        assert self._relevance is not None
        passages = [self.examples.passages[number] for one in examples for number in one.passages]
        self._relevance.learn([one.question for one in examples if one.question], passages)

    def _ordered(self, example: Example) -> list[int]:
        """The passages as they are read: nearest first by the control `plain`, which has no room for all of them."""
        # A summary has no question that a passage could be near to.
        if self.system != "plain" or not self._relevance or not example.question:
            return example.passages
        shown = [self.examples.passages[number] for number in example.passages]
        near = dict(zip(example.passages, self._relevance.of(example.question, shown), strict=True))
        return sorted(example.passages, key=lambda number: -near[number])

    def _keep(self, step: int, row: int, count: int, example: Example | None = None) -> NDArray[np.bool_]:
        """Which of a prompt's chunks [count] are kept, however the run is cut into micro-batches and over ranks."""
        chance, keep = np.random.default_rng([self.examples.seed, 11, step, row]), np.zeros(count, bool)
        if self.system in ("full", "none") or not count or chance.random() >= self.settings.kept_prompts_share:
            return keep
        kept = int(chance.integers(1, math.ceil(self.settings.most_share_kept * count) + 1))
        if self.system == "refrag" and example and example.gold and chance.random() < EVIDENT_SHARE:
            keep[kept_by_evidence(self._evidence(example, self._rate(step)), kept, chance)] = True
        else:
            keep[kept_at_random(count, kept, chance)] = True
        return keep

    def _evidence(self, example: Example, rate: int = 1) -> NDArray[np.int8]:
        """Levels [L], as `evidence_levels` has them, of the chunks of an example whose gold passages are known."""
        shown, gold = ([self.examples.passages[number] for number in one] for one in (example.passages, example.gold))
        cut = [Chunks(self._tokens(self._table.rows([number], rate))) for number in example.passages]
        return evidence_levels(self.model.tokenizer, shown, cut, gold, [example.answer]).numpy()

    def _read(
        self,
        before: list[int],
        chunks: NDArray[np.int64],
        keep: NDArray[np.bool_],
        after: list[int],
        answer: list[int],
        from_end: bool = False,
    ) -> _Row:
        """The sequence as the system reads it: passages as chunks, or by a control as text.

        Args: from_end: let `plain`, too, read the last tokens: what follows is near to those.
        """
        tokens = self._tokens(chunks)
        if self.system == "refrag":
            prompt: Prompt = [Text(before), Chunks(tokens, torch.from_numpy(keep)), Text([*after, *answer])]
            return _Row(prompt, chunks, answer)
        read = tokens[tokens != PAD].tolist()
        # As many as REFRAG's passages take positions.
        room = len(chunks) + int(keep.sum()) * (tokens.shape[1] - 1)
        if self.system == "truncated" or (self.system == "plain" and from_end):
            read = read[-room:]
        elif self.system == "plain":
            read = read[:room]
        elif self.system == "none":
            read = []
        return _Row([Text([*before, *read, *after, *answer])], chunks[:0], answer)

    def _tokens(self, rows: NDArray[np.int64]) -> Tensor:
        """Token ids [L, rate k] of rows [L, rate]."""
        return torch.from_numpy(self._table.token_ids(rows)).flatten(1)

    @torch.no_grad()
    def prepare_updates(self, batch: Batch) -> None:
        """Look up what a frozen encoder makes of the chunks."""
        frozen = self.system == "refrag" and not self.train_encoder
        batch["vectors"] = self._vectors.of(batch["chunk_rows"]) if frozen else None

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        # Padding stands to the right, where nothing that counts can see it: no mask is needed.
        hidden = decoder_states(self.model.decoder, self._embeds(batch))
        predicting = hidden.flatten(0, 1)[batch["predicting"]]
        head = head_weight(self.model.decoder)
        # Another number of answer tokens in every batch: a compiled block would be compiled again for each.
        return share(batch) * linear_cross_entropy(predicting, head, batch["answers"], compiled=False), {}

    def _embeds(self, batch: Batch) -> Tensor:
        """What the decoder reads, [B, N, d]."""
        token_ids, index = batch["token_ids"], batch["chunk_index"]
        if self.system != "refrag":
            return self.model.decoder.get_input_embeddings()(token_ids)
        vectors = batch["vectors"]
        if vectors is None:
            vectors = encoded_rows(self.model, self._table, batch["chunk_rows"])
        vectors = pool_vectors(vectors, torch.from_numpy(batch["chunk_rows"] >= 0), batch.get("rate", 1))
        return self.model.gather(token_ids, index, self.model.project(vectors.flatten(0, -2)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [*encoder_groups(self.model, self.settings), decoder_group(self.model, self.settings)]

    def counts(self, batch: Batch) -> list[int]:
        return [len(batch["answers"])]

    def positions(self, batch: Batch) -> int:
        return batch["token_ids"].numel()


def text_windows(corpus: Path, settings: FinetunedRecipe, model: RefragModel, seed: int) -> WindowSampler | None:
    """The corpus' windows that a recipe lets fine-tuning continue, if it does.

    Raises:
        RecipeError: a context is not whole chunks.
        RefragError: the corpus has no document as long as a window.
    """
    if not settings.text_share:
        return None
    whole_chunks("finetuned.context_tokens", settings.context_tokens, model.chunk_size)
    length = settings.context_tokens + settings.output_tokens
    return WindowSampler(corpus, "train", length, seed, settings.batch_size, "finetuned")


def train_finetuned(context: StageContext) -> dict[str, Any]:
    """The stage: the CPT checkpoint in, a model that answers out; `policy` learns afterwards what it should read.

    A control for which the recipe lists several learning rates is trained with each; its metrics say how they did.

    Raises:
        RefragError: as `Examples`; several rates are listed, and the corpus has no validation questions to choose by.
    """
    recipe, corpus, root = context.recipe, context.inputs["corpus"], context.project.root
    base = context.project.recipe_path(recipe.name).parent
    relevance = recipe_relevance(recipe, base, default_device()) if recipe.system == "plain" else None

    def task_of(model: RefragModel, settings: FinetunedRecipe, split: Split = "train") -> FinetunedTask:
        examples = Examples(corpus, settings, recipe.seed, root, split)
        windows = text_windows(corpus, settings, model, recipe.seed)
        return FinetunedTask(model, settings, examples, recipe.system, windows, relevance)

    rates, settings = recipe.as_control.learning_rates if recipe.as_control else [], recipe.finetuned
    if len(rates) > 1:
        return train_at_best_rate(context, rates, task_of)
    if rates:
        settings = settings.model_copy(update={"decoder_learning_rate": rates[0]})
    model = load_model(context, context.inputs["cpt"])
    summary = train(task_of(model, settings), settings, context.work, f"finetuned of {recipe.name}")
    return finish(context, model, summary)
