"""The policy (appendix A.1): GRPO with PPO clipping over Plackett-Luce picks; everything else is frozen.

Before that it may learn where the answers of training questions stand (ours; training/evidence.py).

G samples per context from the policy as it is, reward = -log-perplexity of the true next tokens, advantage
= (r - mean) / std within the group, clipped ratios on each pick, no KL term. An episode is a window of text, as in the
paper, or (ours) a question over passages, whose answer is the text to predict. A policy that reads the question has
none to read in a window: what follows is all that one could ask for there, and it would give the reward away.
Run: `refrag run policy --model tiny`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refrag_platform.errors import RecipeError
from refrag_platform.model.families import most_positions, require_positions
from refrag_platform.model.loading import default_device
from refrag_platform.model.policy import (
    PolicyNetwork,
    budget,
    keep_mask,
    pick_log_probs,
    sample_picks,
    select,
)
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import whole_chunks
from refrag_platform.recipes import PolicyRecipe
from refrag_platform.stages import SHIPPED, StageContext
from refrag_platform.store.relevance import PassageRelevance, recipe_relevance
from refrag_platform.training.core.artifact import load_model, parameter_counts, write_training
from refrag_platform.training.core.batch import Batch, share
from refrag_platform.training.core.loop import Task, train
from refrag_platform.training.core.precision import autocast
from refrag_platform.training.core.ranks import is_main
from refrag_platform.training.core.windows import WindowSampler
from refrag_platform.training.episodes import (
    Episode,
    QuestionEpisodes,
    collate,
    context_vectors,
    judged_losses,
    log_perplexity,
    policy_inputs,
    window_episode,
)
from refrag_platform.training.evidence import HAS_ANSWER, evidence_counts, evidence_losses, kept_answers
from refrag_platform.training.start import take_over_packed
from refrag_platform.training.usable import LeftOut, training_questions

# Episodes whose chunk vectors the policy's metric is taken from.
FITTED = 128


class PolicyTask(Task):
    """Learns which chunks are worth their tokens."""

    # Its loss is of choices that it draws itself, and at first of another kind.
    comparable = False
    shardable = False

    def __init__(
        self,
        model: RefragModel,
        policy: PolicyNetwork,
        settings: PolicyRecipe,
        windows: WindowSampler | None,
        questions: QuestionEpisodes | None,
        seed: int,
    ) -> None:
        """Args: windows, questions: either may be missing where `policy.question_share` never asks for it."""
        super().__init__()
        self.policy, self.settings, self.seed = policy, settings, seed
        self.windows, self.questions = windows, questions
        self.updates_per_batch = settings.updates_per_batch
        # Not a submodule: the frozen model is neither optimized nor saved with the checkpoints.
        self._frozen = [model.eval().requires_grad_(False)]

    @property
    def model(self) -> RefragModel:
        return self._frozen[0]

    def frozen(self) -> Sequence[nn.Module]:
        return self._frozen

    def batch(self, step: int, micro: int, size: int, rank: int, world: int) -> Batch:
        episodes = self._episodes(step, micro, size, rank, world)
        batch = collate(episodes, self.settings.share_kept, self.model.chunk_size)
        # Each row draws for itself, so that a batch has the same samples however it is shared among ranks.
        first = (self.seed * 1_000_003 + step) * 4096 + micro * size
        seeds = [first + row for row in _rows(size, rank, world)]
        return batch | {"seeds": seeds, "rewarded": step >= self.settings.evidence_steps}

    def _episodes(self, step: int, micro: int, size: int, rank: int, world: int) -> list[Episode]:
        # A window has no evidence to learn from.
        asks = step < self.settings.evidence_steps
        asks = asks or np.random.default_rng([self.seed, 6, step]).random() < self.settings.question_share
        if asks and self.questions:
            return self.questions.draw(step, [micro * size + row for row in _rows(size, rank, world)])
        assert self.windows is not None
        tokens = self.windows.batch(step, micro, size, rank, world)
        return [window_episode(row, self.settings.context_tokens, self.model) for row in tokens]

    @torch.no_grad()
    def prepare_updates(self, batch: Batch) -> None:
        """Draw the group's samples, score them and keep what the clipped updates compare with."""
        batch["given"] = inputs = self.observe(batch)
        if not batch["rewarded"]:
            return
        logits = self.policy(**inputs)
        generators = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]
        picks = sample_picks(logits, batch["most_kept"], self.settings.group_size, generators)
        # Rows with fewer chunks pick fewer of them.
        counted = torch.arange(batch["most_kept"], device=picks.device) < batch["kept"][:, None]
        rewards = self.rewards(batch, inputs["vectors"], keep_mask(picks, logits.shape[1], counted))
        spread = rewards.std(1, keepdim=True)
        batch |= {
            "picks": picks,
            "counted": counted,
            "old": pick_log_probs(logits, picks, counted),
            "advantage": (rewards - rewards.mean(1, keepdim=True)) / (spread + 1e-6),
            "rewards": rewards,
        }

    @torch.no_grad()
    def observe(self, batch: Batch) -> dict[str, Any]:
        """What the policy is given for each episode: chunk vectors [B, L, dim] and, if it reads it, the question."""
        with autocast(self.settings.precision, batch["chunks"].device):
            vectors = context_vectors(self.model, batch).float()
            return policy_inputs(self.model, self.policy, batch, vectors)

    @torch.no_grad()
    def rewards(self, batch: Batch, vectors: Tensor, keep: Tensor) -> Tensor:
        """-log-perplexity of the true tokens for keep [B, G, L]: [B, G]."""
        with autocast(self.settings.precision, keep.device):
            return -log_perplexity(judged_losses(self.model, batch, vectors, keep), batch["labels"])

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        # In float32, as the samples were drawn: rounded logits alone would move the ratios.
        with torch.autocast(batch["chunks"].device.type, enabled=False):
            logits = self.policy(**batch["given"])
        if not batch["rewarded"]:
            return self._evidence_loss(logits, batch)
        loss, figures = self._clipped_loss(logits, batch)
        if self.settings.evidence_weight:
            evident, told = self._evidence_loss(logits, batch)
            loss, figures = loss + self.settings.evidence_weight * evident, figures | told
        return loss, figures

    def _evidence_loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """The mean over both levels of evidence."""
        losses = evidence_losses(logits, batch["evidence"])
        shared = torch.stack([share(batch, 1 + level) * loss for level, loss in enumerate(losses)])
        return shared.mean(), {"evidence_loss": losses.detach().mean()}

    def _clipped_loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """The clipped policy gradient over the group's picks, and what they earned."""
        counted = batch["counted"]
        ratio = (pick_log_probs(logits, batch["picks"], counted) - batch["old"]).exp()
        clipped = ratio.clamp(1 - self.settings.clip, 1 + self.settings.clip)
        advantage = batch["advantage"][..., None]
        gain = torch.minimum(ratio * advantage, clipped * advantage) * counted[:, None]
        picks = counted.sum() * self.settings.group_size
        return -share(batch) * gain.sum() / picks.clamp(min=1), {
            "reward": batch["rewards"].mean(),
            "reward_spread": batch["rewards"].std(1).mean(),
            "clipped_share": ((ratio.detach() != clipped.detach()) & counted[:, None]).sum() / picks.clamp(min=1),
        }

    @torch.no_grad()
    def probe(self, batch: Batch) -> dict[str, float]:
        """Reward of the policy's own choice and of a random one at the same budget; how often it keeps the answer."""
        inputs = self.observe(batch)
        logits, share = self.policy(**inputs), self.settings.share_kept
        chance = torch.rand(logits.shape, generator=torch.Generator().manual_seed(batch["seeds"][0]))
        choices = [select(scores, inputs["mask"], share) for scores in (logits, chance.to(logits.device))]
        rewards = self.rewards(batch, inputs["vectors"], torch.stack(choices, 1)).mean(0)
        figures = {"policy_reward": float(rewards[0]), "random_reward": float(rewards[1])}
        if (batch["evidence"] == HAS_ANSWER).any():
            figures["answer_kept"] = float(kept_answers(choices[0], batch["evidence"]))
        return figures

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"name": "policy", "params": list(self.policy.parameters()), "lr": self.settings.learning_rate}]

    def counts(self, batch: Batch) -> list[int]:
        return [int(batch["kept"].sum()), *evidence_counts(batch["evidence"])]

    def positions(self, batch: Batch) -> int:
        # Without a reward no decoder is asked.
        return len(batch["slots"]) * self.settings.group_size * batch["length"] if batch["rewarded"] else 0


def _rows(size: int, rank: int, world: int) -> range:
    """This rank's rows of a micro-batch; a group's samples are all of one row, and so of one rank."""
    return range(rank * size // world, (rank + 1) * size // world)


def policy_task(
    model: RefragModel,
    corpus: Path,
    settings: PolicyRecipe,
    seed: int,
    root: Path = Path(),
    start: PolicyNetwork | None = None,
    relevance: PassageRelevance | None = None,
) -> PolicyTask:
    """The task over a corpus' training split and questions, with a fresh policy; one that reads questions is fitted.

    Args:
        root: question files of the recipe are relative to it.
        start: a policy to go on from, instead of a fresh one; `relevance` may be new to it.
        relevance: what a policy is told that reads it.

    Raises:
        RecipeError: the budget keeps no chunk of a window or a question, or all of them; windows are longer than the
            decoder's positions; `start` is a network of another kind.
        RefragError: the corpus has no document as long as a window, or there is no question to learn from.
    """
    windows, questions = None, None
    if settings.question_share < 1:
        chunks = whole_chunks("policy.context_tokens", settings.context_tokens, model.chunk_size)
        kept = budget(chunks, settings.share_kept)
        if not 0 < kept < chunks:
            raise RecipeError(
                f"policy.share_kept is {settings.share_kept}: of the {chunks} chunks of policy.context_tokens "
                f"({settings.context_tokens}) it keeps {kept}, so there is nothing to choose; change one of the two"
            )
        require_positions(
            model.decoder,
            1 + chunks + kept * (model.chunk_size - 1) + settings.output_tokens,
            "shorten policy.context_tokens or policy.output_tokens",
        )
        length = settings.context_tokens + settings.output_tokens
        windows = WindowSampler(corpus, "train", length, seed, settings.batch_size, "policy")
    if settings.question_share:
        left_out = LeftOut("policy")
        questions = QuestionEpisodes(
            model.tokenizer,
            training_questions(corpus, settings.questions, root, left_out),
            settings.passages,
            model.chunk_size,
            seed,
            ranked_share=settings.ranked_share,
            min_passages=settings.min_passages,
            relevance=relevance,
            share_kept=settings.share_kept,
            positions=most_positions(model.decoder),
            left_out=left_out,
        )
        questions.refuse_no_choice(settings.batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = policy_network(settings, model.vector_dim)
    if start:
        policy = _as_set(start, policy)
    elif questions and policy.reads_question:
        policy.fit(_sample(model, questions))
    policy.encoder_digest = model.encoder_digest()
    return PolicyTask(model, policy, settings, windows, questions, seed)


def policy_network(settings: PolicyRecipe, vector_dim: int) -> PolicyNetwork:
    """The network that a recipe describes, as it begins."""
    return PolicyNetwork(
        vector_dim,
        settings.hidden_size,
        settings.layers,
        settings.heads,
        settings.share_kept,
        settings.query,
        settings.relevance is not None,
    )


def _as_set(start: PolicyNetwork, fresh: PolicyNetwork) -> PolicyNetwork:
    """The network that the recipe describes, with the weights of `start`."""
    weights = start.state_dict()
    alike = fresh.settings | ({} if start.reads_relevance else {"relevance": False})
    if start.settings != alike:
        odd = next(name for name, value in alike.items() if start.settings[name] != value)
        raise RecipeError(
            f"the policy to go on from is another network than the recipe's: its {odd} is {start.settings[odd]!r}, not "
            f"{fresh.settings[odd]!r}; set policy.query, layers, hidden_size and heads as it was trained"
        )
    # What `start` was never told is where a fresh policy starts.
    fresh.load_state_dict(fresh.state_dict() | weights)
    return fresh


@torch.no_grad()
def _sample(model: RefragModel, questions: QuestionEpisodes) -> Tensor:
    """Chunk vectors [n, dim] of some episodes, on the CPU, where a policy begins."""
    passages = [passage for episode in questions.draw(0, range(FITTED)) for passage in episode.passages]
    return torch.cat(model.encoder.encode_passages(passages)).cpu()


def train_policy(context: StageContext) -> dict[str, Any]:
    """The stage: the fine-tuned model, frozen, in; a policy network out, or the release's."""
    if context.recipe.policy.continue_from == SHIPPED:
        return take_over_packed(context)
    model, recipe = load_model(context, context.inputs["finetuned"]), context.recipe
    base = context.project.recipe_path(recipe.name).parent
    relevance = recipe_relevance(recipe, base, default_device()) if recipe.policy.relevance else None
    # The policy is fitted to a sample of vectors before training moves the model: on a CPU that took a minute. The
    # decoder, which may be too large for all ranks on one GPU, stays where it is.
    model.encoder.to(default_device())
    task = policy_task(
        model, context.inputs["corpus"], recipe.policy, recipe.seed, context.project.root, relevance=relevance
    )
    summary = train(task, recipe.policy, context.work, f"policy of {recipe.name}")
    if is_main():
        task.policy.save(context.out)
    return write_training(context, summary, parameter_counts({"policy": task.policy}))
