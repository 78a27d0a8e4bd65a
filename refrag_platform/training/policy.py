"""The policy (appendix A.1): GRPO with PPO clipping over Plackett-Luce picks; everything else is frozen.

G samples per context from the policy as it is, reward = -log-perplexity of the true next o tokens, advantage
= (r - mean) / std within the group, clipped ratios on each pick, no KL term.
Run: `refrag run policy --model tiny`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refrag_platform.errors import RecipeError
from refrag_platform.model.policy import (
    PolicyNetwork,
    budget,
    keep_mask,
    pick_log_probs,
    sample_picks,
    select,
)
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import window_layout
from refrag_platform.recipes import PolicyRecipe, TrainingRecipe
from refrag_platform.stages import StageContext
from refrag_platform.training.core.artifact import load_model, parameter_counts, write_training
from refrag_platform.training.core.groups import decoder_body, head_weight
from refrag_platform.training.core.loop import Batch, Task, train
from refrag_platform.training.core.losses import token_losses
from refrag_platform.training.core.ranks import is_main
from refrag_platform.training.core.windows import Windows

ROLLOUTS = 64


class PolicyTask(Task):
    """Learns which chunks are worth their tokens."""

    def __init__(
        self, model: RefragModel, policy: PolicyNetwork, settings: PolicyRecipe, windows: Windows, seed: int
    ) -> None:
        super().__init__()
        self.policy, self.settings, self.windows, self.seed = policy, settings, windows, seed
        self.updates_per_batch = settings.updates_per_batch
        # Not a submodule: the frozen model is neither optimized nor saved with the checkpoints.
        self._frozen = [model.eval().requires_grad_(False)]

    @property
    def model(self) -> RefragModel:
        return self._frozen[0]

    def batch(self, step: int, micro: int, size: int, rank: int, world: int) -> Batch:
        tokens = self.windows.batch(step, micro, size, rank, world)
        s, k = self.settings.context_tokens, self.model.chunk_size
        return {
            "context": tokens[:, :s].reshape(len(tokens), s // k, k),
            "output": tokens[:, s:],
            "seed": (self.seed * 1_000_003 + step) * 4096 + micro * 64 + rank,
        }

    @torch.no_grad()
    def prepare_updates(self, batch: Batch) -> None:
        """Draw the group's samples, score them and keep what the clipped updates compare with."""
        context = batch["context"]
        chunks = context.shape[1]
        vectors = self.vectors(context)
        logits = self.policy(vectors)
        generator = torch.Generator().manual_seed(batch["seed"])
        picks = sample_picks(logits, budget(chunks, self.settings.share_kept), self.settings.group_size, generator)
        rewards = self.rewards(context, vectors, keep_mask(picks, chunks), batch["output"])
        spread = rewards.std(1, keepdim=True)
        batch |= {
            "vectors": vectors,
            "picks": picks,
            "old": pick_log_probs(logits, picks),
            "advantage": (rewards - rewards.mean(1, keepdim=True)) / (spread + 1e-6),
            "rewards": rewards,
        }

    @torch.no_grad()
    def vectors(self, context: Tensor) -> Tensor:
        """Chunk vectors [B, L, dim] of contexts [B, L, k]."""
        # The frozen model is no part of what accelerate moves; this is the first use of it in any step.
        self.model.to(context.device)
        with self._precision(context):
            return self.model.encode(context.flatten(0, 1), padded=False).view(*context.shape[:2], -1).float()

    def _precision(self, tensor: Tensor) -> torch.autocast:
        return torch.autocast(tensor.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    @torch.no_grad()
    def rewards(self, context: Tensor, vectors: Tensor, keep: Tensor, output: Tensor) -> Tensor:
        """-log-perplexity of the output [B, o] for keep [B, G, L]: [B, G]."""
        size, group = keep.shape[:2]
        flat = keep.flatten(0, 1)
        rows = torch.arange(size, device=context.device).repeat_interleave(group)
        parts = []
        for start in range(0, len(flat), ROLLOUTS):
            row = rows[start : start + ROLLOUTS]
            with self._precision(context):
                parts.append(self._reward(context[row], vectors[row], flat[start : start + ROLLOUTS], output[row]))
        return torch.cat(parts).view(size, group)

    def _reward(self, context: Tensor, vectors: Tensor, keep: Tensor, output: Tensor) -> Tensor:
        token_ids, index = (t.to(context.device) for t in window_layout(context.cpu(), keep.cpu()))
        decoder = self.model.decoder
        embeds = self.model.gather(token_ids, index, self.model.project(vectors.flatten(0, 1)))
        inputs = torch.cat([embeds, decoder.get_input_embeddings()(output)], 1)
        hidden = decoder_body(decoder)(inputs_embeds=inputs, use_cache=False).last_hidden_state
        predicting = hidden[:, embeds.shape[1] - 1 : -1].flatten(0, 1)
        losses = token_losses(predicting, head_weight(decoder), output.flatten())
        return -losses.view(output.shape).mean(1)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        log_probs = pick_log_probs(self.policy(batch["vectors"]), batch["picks"])
        ratio = (log_probs - batch["old"]).exp()
        clipped = ratio.clamp(1 - self.settings.clip, 1 + self.settings.clip)
        advantage = batch["advantage"][..., None]
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        return loss, {
            "reward": batch["rewards"].mean(),
            "reward_spread": batch["rewards"].std(1).mean(),
            "clipped_share": (ratio.detach() != clipped.detach()).float().mean(),
        }

    @torch.no_grad()
    def probe(self, batch: Batch) -> dict[str, float]:
        """Reward of the policy's own choice and of a random one at the same budget."""
        context = batch["context"]
        vectors = self.vectors(context)
        logits = self.policy(vectors)
        chosen = select(logits, None, self.settings.share_kept)[:, None]
        generator = torch.Generator().manual_seed(batch["seed"] + 1)
        picks = sample_picks(torch.zeros_like(logits), budget(logits.shape[1], self.settings.share_kept), 1, generator)
        return {
            "policy_reward": float(self.rewards(context, vectors, chosen, batch["output"]).mean()),
            "random_reward": float(
                self.rewards(context, vectors, keep_mask(picks, logits.shape[1]), batch["output"]).mean()
            ),
        }

    def parameter_groups(self, settings: TrainingRecipe) -> list[dict[str, Any]]:
        return [{"params": list(self.policy.parameters()), "lr": settings.projection_learning_rate}]

    def positions(self, batch: Batch) -> int:
        size, chunks, k = batch["context"].shape
        kept = budget(chunks, self.settings.share_kept)
        return size * self.settings.group_size * (chunks - kept + kept * k + batch["output"].shape[1])


def policy_task(model: RefragModel, corpus: Any, settings: PolicyRecipe, seed: int) -> PolicyTask:
    """The task over a corpus' training split, with a fresh policy.

    Raises:
        RecipeError: the budget keeps no chunk of an episode, or all of them.
        RefragError: the corpus has no document as long as an episode.
    """
    chunks = settings.context_tokens // model.chunk_size
    kept = budget(chunks, settings.share_kept)
    if not 0 < kept < chunks:
        raise RecipeError(
            f"policy.share_kept is {settings.share_kept}: of the {chunks} chunks of policy.context_tokens "
            f"({settings.context_tokens}) it keeps {kept}, so there is nothing to choose; change one of the two"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = PolicyNetwork(
            model.vector_dim, settings.hidden_size, settings.layers, settings.heads, settings.share_kept
        )
    windows = Windows(corpus, "train", settings.context_tokens + settings.output_tokens, seed)
    return PolicyTask(model, policy, settings, windows, seed)


def train_policy(context: StageContext) -> dict[str, Any]:
    """The stage: the CPT checkpoint, frozen, in; a policy network out."""
    model = load_model(context, "cpt")
    task = policy_task(model, context.inputs["corpus"], context.recipe.policy, context.recipe.seed)
    summary = train(task, context.recipe.policy, context.work, f"policy of {context.recipe.name}")
    if is_main():
        task.policy.save(context.out)
    return write_training(context, summary, parameter_counts({"policy": task.policy}))
