"""Fine-tuning (section 4): instruction tuning on RAG questions, conversations and summaries.

Encoder and policy stay frozen unless the recipe says otherwise, so that store, policy and model agree.
Half of the prompts have chunks expanded by the policy at its budget, half have none (or as the recipe says,
`shares_kept`): the model learns to read both. Some steps may continue windows of text, as CPT does (ours). The same
task trains the controls, on the same examples: all passages as text, none of them, or their last tokens.
Run: `refrag run finetuned --model tiny`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from refrag_platform.errors import RecipeError
from refrag_platform.model.decoder import decoder_states, head_weight
from refrag_platform.model.families import most_positions, require_positions
from refrag_platform.model.loading import default_device
from refrag_platform.model.policy import PolicyNetwork, budget
from refrag_platform.model.prompts import content_ids, contents_ids, end_of_turn, rag_prompt
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import PAD, Text, pack_slots, prompt_length, whole_chunks
from refrag_platform.recipes import FinetunedRecipe
from refrag_platform.stages import STAGES, StageContext
from refrag_platform.store.relevance import PassageRelevance, relevance_for
from refrag_platform.training.core.artifact import finish, load_model
from refrag_platform.training.core.groups import decoder_group, encoder_groups
from refrag_platform.training.core.loop import Batch, Task, train
from refrag_platform.training.core.lora import prepare_decoder, prepare_encoder
from refrag_platform.training.core.losses import linear_cross_entropy
from refrag_platform.training.core.ranks import is_main
from refrag_platform.training.core.windows import Windows
from refrag_platform.training.examples import Example, Examples
from refrag_platform.training.passage_table import ChunkVectors, PassageTable, encoded_rows

if TYPE_CHECKING:
    from refrag_platform.training.cpt import System

# Prompts are padded to a multiple of this: few lengths reach the GPU's kernels and its allocator.
LENGTH_STEP = 64
# Windows of text that are continued; their vectors, too, are made once.
WINDOWS = 2048


@dataclass(frozen=True)
class _Row:
    """One sequence: ids before the passages, the passages' chunks in the table, ids after them, and the answer's.

    question: its ids, for a policy that reads them. relevance: of each chunk's passage, for one that is told it.
    """

    before: list[int]
    chunks: NDArray[np.int64]
    after: list[int]
    answer: list[int]
    question: list[int]
    relevance: NDArray[np.float32] | None = None


class FinetunedTask(Task):
    """The answers' loss, the passages read as vectors, or by a control as text.

    Which chunks are compressed is known on the device only, by the policy: there the slots in use are moved together
    (`segments.pack_slots`), and a step never waits for it.
    """

    def __init__(
        self,
        model: RefragModel,
        policy: PolicyNetwork | None,
        settings: FinetunedRecipe,
        examples: Examples,
        system: System = "refrag",
        windows: Windows | None = None,
        relevance: PassageRelevance | None = None,
    ) -> None:
        """
        Args:
            policy: expands chunks in half of the prompts; without one none is expanded. A control has none.
            relevance: what a policy is told that reads it.
            windows: of text to continue, each a context and its output; needed where `settings.text_share` asks for it.
        """
        super().__init__()
        self.model, self.settings, self.examples, self.system = model, settings, examples, system
        self.train_encoder = settings.train_encoder and system == "refrag"
        if self.train_encoder:
            prepare_encoder(model, settings, examples.seed)
        else:
            model.encoder.requires_grad_(False)
            model.encoder.eval()
        if system != "refrag":
            model.projection.requires_grad_(False)
        prepare_decoder(model, settings, examples.seed)
        self._policy, self._relevance = [policy], relevance
        self._tokenizer = cast(PreTrainedTokenizerFast, _Remembering(model.tokenizer))
        # Drawn once, as all passages lie in one table.
        self._windows = windows.batch(0, 0, WINDOWS).numpy() if windows else np.empty((0, 0), np.int64)
        contexts = self._windows[:, : settings.context_tokens].astype(np.int32) if windows else None
        self._table = PassageTable(model.tokenizer, examples.passages, model.chunk_size, contexts)
        self._vectors = ChunkVectors(model, self._table, settings.precision == "bf16")
        self._fit()

    def _fit(self) -> None:
        """Hold what there is to draw against the decoder's positions.

        Raises:
            RecipeError: windows of text are too long. RefragError: nothing fits.
        """
        positions = most_positions(self.model.decoder)
        if positions is None:
            return
        k, policy = self.model.chunk_size, self._policy[0]
        share = max(self.settings.shares_kept or [policy.share_kept]) if policy else 0.0

        def cost(chunks: NDArray[np.int64]) -> NDArray[np.int64]:
            """Positions of passages of so many chunks."""
            if self.system in {"full", "none"}:
                return chunks * (k if self.system == "full" else 0)
            return chunks + np.ceil(chunks * share).astype(np.int64) * (k - 1)

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
        shares = [self._share(step, number) for number in numbers]
        continues = np.random.default_rng([self.examples.seed, 9, step]).random() < self.settings.text_share
        if continues:
            made = [self._text_row(step, number, own) for number, own in zip(numbers, shares, strict=True)]
        else:
            examples = [self.examples.draw(step, number) for number in numbers]
            self._embed([one for one, own in zip(examples, shares, strict=True) if own])
            made = [self._row(one, own) for one, own in zip(examples, shares, strict=True)]
        k = self.model.chunk_size
        counts = np.array([len(row.chunks) for row in made])
        kept = np.array([budget(int(count), own) for count, own in zip(counts, shares, strict=True)])
        texts = np.array([len(row.before) + len(row.after) + len(row.answer) for row in made])
        slots = np.full((len(made), int((texts + counts * k).max())), PAD, np.int64)
        owners = np.full_like(slots, -1)
        chunk_rows = np.full((len(made), max(1, int(counts.max()))), -1, np.int64)
        relevance = np.full(chunk_rows.shape, np.nan, np.float32)
        asked = np.full((len(made), max(1, *(-(-len(row.question) // k) for row in made)) * k), PAD, np.int64)
        for number, row in enumerate(made):
            start, end = len(row.before), len(row.before) + len(row.chunks) * k
            slots[number, :start] = row.before
            slots[number, start:end] = self._table.chunks[row.chunks].ravel()
            slots[number, end : end + len(row.after) + len(row.answer)] = [*row.after, *row.answer]
            owners[number, start:end] = np.repeat(np.arange(len(row.chunks)), k)
            chunk_rows[number, : len(row.chunks)] = row.chunks
            if row.relevance is not None:
                relevance[number, : len(row.chunks)] = row.relevance
            asked[number, : len(row.question)] = row.question
        answers = [row.answer for row in made]
        # A kept chunk may be partial, and the prompt shorter than this.
        longest = int((texts + counts + kept * (k - 1)).max())
        return {
            "slots": torch.from_numpy(slots),
            "owners": torch.from_numpy(owners),
            "kept": torch.from_numpy(kept),
            "counts": torch.from_numpy(counts),
            "chunk_rows": chunk_rows,
            "relevance": torch.from_numpy(relevance),
            "asked": torch.from_numpy(asked.reshape(len(made), -1, k)),
            "expanded": bool(kept.any()),
            "length": -(-longest // LENGTH_STEP) * LENGTH_STEP,
            "answers": torch.tensor([token for answer in answers for token in answer]),
            "answer_rows": torch.tensor([row for row, answer in enumerate(answers) for _ in answer]),
            "to_end": torch.tensor([left for answer in answers for left in range(len(answer), 0, -1)]),
        }

    def _share(self, step: int, row: int) -> float:
        """Share of a prompt's chunks that are kept, however the run is cut into micro-batches and over ranks."""
        if self._policy[0] is None:
            return 0.0
        if shares := self.settings.shares_kept:
            return shares[int(np.random.default_rng([self.examples.seed, 11, step, row]).integers(len(shares)))]
        return self._policy[0].share_kept if (step + row) % 2 == 0 else 0.0

    def _text_row(self, step: int, row: int, share: float) -> _Row:
        """A window of text: after the token that starts one, its context, and what follows as the answer."""
        number = int(np.random.default_rng([self.examples.seed, 10, step, row]).integers(len(self._windows)))
        output = self._windows[number, self.settings.context_tokens :].tolist()
        return self._read([self.model.start_token_id], [len(self.examples.passages) + number], [], output, [], share)

    def _embed(self, examples: Sequence[Example]) -> None:
        """What the policy will be told of these, embedded together."""
        if self._relevance:
            passages = [self.examples.passages[number] for one in examples for number in one.passages]
            self._relevance.learn([one.question for one in examples], passages)

    def _row(self, example: Example, share: float) -> _Row:
        tokenizer = self._tokenizer
        kind = "summary" if example.task == "summarization" else "answer"
        before, after = [
            part.token_ids
            for part in rag_prompt(tokenizer, example.question, [], example.history, kind)  # type: ignore[arg-type]
            if isinstance(part, Text)
        ]
        answer = [*content_ids(tokenizer, example.answer), end_of_turn(tokenizer)]
        row = self._read(before, example.passages, after, answer, content_ids(tokenizer, example.question), share)
        # A summary has no question that a passage could be near to.
        if not share or not self._relevance or not example.question:
            return row
        found = self._relevance.of(example.question, [self.examples.passages[number] for number in example.passages])
        lengths = [len(self._table.rows([number])) for number in example.passages]
        return replace(row, relevance=np.repeat(np.array(found, np.float32), lengths))

    def _read(
        self,
        before: list[int],
        passages: list[int],
        after: list[int],
        answer: list[int],
        question: list[int],
        share: float,
    ) -> _Row:
        """The sequence as the system reads it: passages as chunks, or by a control as text."""
        chunks = self._table.rows(passages)
        if self.system == "refrag":
            return _Row(before, chunks, after, answer, question)
        tokens = self._table.chunks[chunks]
        read = tokens[tokens != PAD].tolist()
        if self.system == "truncated":
            # As many as REFRAG's passages take positions.
            read = read[-(len(chunks) + budget(len(chunks), share) * (self.model.chunk_size - 1)) :]
        elif self.system == "none":
            read = []
        return _Row([*before, *read], chunks[:0], after, answer, [])

    @torch.no_grad()
    def prepare_updates(self, batch: Batch) -> None:
        """Choose the chunks to expand and move the slots in use together."""
        slots, owners = batch["slots"], batch["owners"]
        chunk_rows = batch["chunk_rows"]
        count = chunk_rows.shape[1]
        real = torch.arange(count, device=slots.device) < batch["counts"][:, None]
        policy = self._policy[0] if batch["expanded"] else None
        vectors = None
        if self.system == "refrag" and (policy or not self.train_encoder):
            vectors = self._vectors.of(chunk_rows)
        keep = torch.zeros_like(real)
        if policy and vectors is not None:
            asked = self._asked(batch["asked"], policy)
            logits = policy.to(slots.device)(vectors, real, *asked, batch["relevance"])
            rank = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            keep = rank < batch["kept"][:, None]
        batch["token_ids"], batch["chunk_index"], positions = pack_slots(slots, owners, keep, batch["length"])
        rows = batch["answer_rows"]
        batch["predicting"] = rows * batch["length"] + positions[rows] - batch["to_end"] - 1
        batch["vectors"] = None if self.train_encoder else vectors

    def _asked(self, token_ids: Tensor, policy: PolicyNetwork) -> tuple[Tensor | None, Tensor | None]:
        """The questions' chunk vectors [B, Q, dim] and which of them are real, for a policy that reads questions."""
        if not policy.reads_question:
            return None, None
        bf16 = self.settings.precision == "bf16" and token_ids.is_cuda
        with torch.autocast(token_ids.device.type, torch.bfloat16, enabled=bf16):
            return self.model.encode(token_ids, padded=True).float(), token_ids[..., 0] != PAD

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        # Padding stands to the right, where nothing that counts can see it: no mask is needed.
        hidden = decoder_states(self.model.decoder, self._embeds(batch))
        predicting = hidden.flatten(0, 1)[batch["predicting"]]
        head = head_weight(self.model.decoder)
        # Another number of answer tokens in every batch: a compiled block would be compiled again for each.
        return linear_cross_entropy(predicting, head, batch["answers"], compiled=False), {}

    def _embeds(self, batch: Batch) -> Tensor:
        """What the decoder reads, [B, N, d]."""
        token_ids, index = batch["token_ids"], batch["chunk_index"]
        if self.system != "refrag":
            return self.model.decoder.get_input_embeddings()(token_ids)
        vectors = batch["vectors"]
        if vectors is None:
            vectors = encoded_rows(self.model, self._table, batch["chunk_rows"])
        return self.model.gather(token_ids, index, self.model.project(vectors.flatten(0, -2)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [*encoder_groups(self.model, self.settings), decoder_group(self.model, self.settings)]

    def positions(self, batch: Batch) -> int:
        return batch["token_ids"].numel()


class _Remembering:
    """A tokenizer that tokenizes each text once: the same questions and answers come again and again."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._known: dict[object, dict[str, list[int]]] = {}

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        key = (text, *options.items())
        if key not in self._known:
            self._known[key] = {"input_ids": self._tokenizer(text, **options)["input_ids"]}
        return self._known[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def text_windows(corpus: Path, settings: FinetunedRecipe, model: RefragModel, seed: int) -> Windows | None:
    """The corpus' windows that a recipe lets fine-tuning continue, if it does.

    Raises:
        RecipeError: a context is not whole chunks.
        RefragError: the corpus has no document as long as a window.
    """
    if not settings.text_share:
        return None
    whole_chunks("finetuned.context_tokens", settings.context_tokens, model.chunk_size)
    length = settings.context_tokens + settings.output_tokens
    return Windows(corpus, "train", length, seed, settings.batch_size, "finetuned")


def train_finetuned(context: StageContext) -> dict[str, Any]:
    """The stage: the CPT checkpoint and the policy in; all that serving needs out."""
    settings = context.recipe.finetuned
    if settings.train_encoder and "finetuned" not in STAGES["chunks"].inputs:
        raise RecipeError(
            "finetuned.train_encoder is true, but in this pipeline the chunk store and the policy come before "
            "fine-tuning; set it to false, or put both after it in stages.py"
        )
    model = load_model(context, "cpt")
    policy = PolicyNetwork.load(context.inputs["policy"])
    corpus, seed = context.inputs["corpus"], context.recipe.seed
    examples = Examples(corpus, settings, seed, context.project.root)
    windows = text_windows(corpus, settings, model, seed)
    base = context.project.recipe_path(context.recipe.name).parent
    relevance = relevance_for(policy, context.recipe, base, default_device())
    task = FinetunedTask(model, policy, settings, examples, windows=windows, relevance=relevance)
    summary = train(task, settings, context.work, f"finetuned of {context.recipe.name}")
    if is_main():
        policy.cpu().save(context.out)
    return finish(context, model, summary)
