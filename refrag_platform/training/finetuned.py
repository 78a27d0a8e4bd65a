"""Fine-tuning (section 4): instruction tuning on RAG questions, conversations and summaries.

Encoder and policy stay frozen unless the recipe says otherwise, so that store, policy and model agree.
Half of the prompts have chunks expanded by the policy at its budget, half have none: the model learns
to read both. Run: `refrag run finetuned --model tiny`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refrag_platform.errors import RecipeError
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.prompts import content_ids, end_of_turn, passage_chunks, rag_prompt
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Text, lay_out
from refrag_platform.model.selection import expand
from refrag_platform.recipes import FinetunedRecipe, TrainingRecipe
from refrag_platform.stages import STAGES, StageContext
from refrag_platform.training.core.artifact import finish, load_model
from refrag_platform.training.core.groups import decoder_body, decoder_group, encoder_groups, head_weight
from refrag_platform.training.core.loop import Batch, Task, train
from refrag_platform.training.core.lora import prepare_decoder
from refrag_platform.training.core.losses import linear_cross_entropy
from refrag_platform.training.core.ranks import is_main
from refrag_platform.training.examples import Example, Examples


class FinetunedTask(Task):
    """The answers' loss, the passages read as vectors."""

    def __init__(
        self, model: RefragModel, policy: PolicyNetwork, settings: FinetunedRecipe, examples: Examples
    ) -> None:
        super().__init__()
        self.model, self.settings, self.examples = model, settings, examples
        if not settings.train_encoder:
            model.encoder.requires_grad_(False)
            model.encoder.eval()
        prepare_decoder(model, settings, examples.seed)
        self._policy = [policy]

    def batch(self, step: int, micro: int, size: int, rank: int, world: int) -> Batch:
        rows = range(rank * size // world, (rank + 1) * size // world)
        examples = [self.examples.draw(step, micro * size + row) for row in rows]
        return {
            "prompts": [self._prompt(example) for example in examples],
            # Every other sequence of the run, however it is cut into micro-batches and over ranks.
            "expanded": [(step + micro * size + row) % 2 == 0 for row in rows],
        }

    def _prompt(self, example: Example) -> tuple[list[Any], list[int]]:
        """An example's prompt and its answer's ids."""
        tokenizer, k = self.model.tokenizer, self.model.chunk_size
        passages = [passage_chunks(tokenizer, p["title"], p["text"], k) for p in example.passages]
        kind = "summary" if example.task == "summarization" else "answer"
        prompt = rag_prompt(tokenizer, example.question, passages, example.history, kind)  # type: ignore[arg-type]
        answer = [*content_ids(tokenizer, example.answer), end_of_turn(tokenizer)]
        return list(prompt), answer

    @torch.no_grad()
    def prepare_updates(self, batch: Batch) -> None:
        """Choose the chunks to expand and lay the batch out; both need the model, not gradients."""
        rows, labels = [], []
        for (prompt, answer), expanded in zip(batch["prompts"], batch["expanded"], strict=True):
            chunks = [part for part in prompt if isinstance(part, Chunks)]
            share = self._policy[0].share_kept if expanded else 0.0
            chosen = iter(expand(self.model, chunks, share, self._policy[0].to(self.model.device)))
            parts = [next(chosen) if isinstance(part, Chunks) else part for part in prompt]
            rows.append([*parts, Text(answer)])
            labels.append(answer)
        layout = lay_out(rows, self.model.chunk_size, "right")
        targets = torch.full(layout.token_ids.shape, -1)
        for row, answer in enumerate(labels):
            end = int(layout.attention_mask[row].sum())
            targets[row, end - len(answer) : end] = torch.tensor(answer)
        device = self.model.device
        batch |= {
            "token_ids": layout.token_ids.to(device),
            "chunk_index": layout.chunk_index.to(device),
            "attention_mask": layout.attention_mask.to(device),
            "targets": targets.to(device),
            "chunk_token_ids": layout.chunk_token_ids.to(device),
            "vectors": layout.vectors if not self.settings.train_encoder else None,
        }

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        vectors = batch["vectors"]
        if vectors is None:
            vectors = self.model.encode(batch["chunk_token_ids"])
        embeds = self.model.gather(batch["token_ids"], batch["chunk_index"], self.model.project(vectors))
        hidden = decoder_body(self.model.decoder)(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"].long(), use_cache=False
        ).last_hidden_state
        targets = batch["targets"][:, 1:]
        chosen = targets >= 0
        head = head_weight(self.model.decoder)
        # Another number of answer tokens in every batch: a compiled block would be compiled again for each.
        return linear_cross_entropy(hidden[:, :-1][chosen], head, targets[chosen], compiled=False), {}

    def parameter_groups(self, settings: TrainingRecipe) -> list[dict[str, Any]]:
        return [*encoder_groups(self.model, settings), decoder_group(self.model, settings)]

    def positions(self, batch: Batch) -> int:
        return batch["token_ids"].numel()


def train_finetuned(context: StageContext) -> dict[str, Any]:
    """The stage: the CPT checkpoint and the policy in; all that serving needs out."""
    settings = context.recipe.finetuned
    if settings.train_encoder and "finetuned" not in STAGES["chunks"].inputs:
        raise RecipeError(
            "finetuned.train_encoder is true, but in this pipeline the chunk store and the policy come before "
            "fine-tuning; set it to false, or put both after it in stages.py and dvc.yaml"
        )
    model = load_model(context, "cpt")
    policy = PolicyNetwork.load(context.inputs["policy"])
    examples = Examples(context.inputs["corpus"], settings, context.recipe.seed, context.project.root)
    summary = train(
        FinetunedTask(model, policy, settings, examples),
        settings,
        context.work,
        f"finetuned of {context.recipe.name}",
    )
    if is_main():
        policy.cpu().save(context.out)
    return finish(context, model, summary)
