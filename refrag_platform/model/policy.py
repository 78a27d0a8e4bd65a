"""The policy: which chunks of a context stay tokens (appendix A.1).

A small transformer over the chunk vectors gives one logit per chunk, once. Picking T' chunks one after
another without replacement, masking those already picked, is a Plackett-Luce draw: Gumbel noise and a
top-T' sample it, and its log-probability is a sum of masked log-softmax terms.

The paper's policy sees the chunks alone. Beside it stands one that is given the question too, cut into chunks and
encoded like any text, and one that is also told how near a retriever found each passage to it (both ours).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.files import write_json

SETTINGS_FILE, WEIGHTS_FILE = "policy.json", "policy.safetensors"

Query = Literal["none", "question"]
# Chunks to both sides over which likeness to the question is averaged: an answer stands near the words asked for.
NEIGHBOURHOODS = (0, 4, 8)
# Of the mean variance, added to each direction's: what hardly varies must not decide.
HELD_BACK = 1e-3
LIKENESS = {"center", "metric", "likeness.weight", "lift.weight"}
# Of a chunk's passage: relevance in units of the context's spread, below the best one's, and whether it is known.
RELEVANCE_FEATURES = 3


class PolicyNetwork(nn.Module):
    """Two transformer layers and a linear head over chunk vectors.

    With query "question" the question's chunks stand before the context's in the transformer, marked by a learned
    vector, and a chunk's logit also has a learned product of its content with the question's mean: to say which chunk
    is about the same thing is then a matter of one layer. It starts from how alike question and chunks are in the
    metric that `fit` takes from vectors of training, by itself and in its neighbourhood: what many chunks have in
    common counts little, as frequent words do in a search. Without a question such a policy reads the chunks alone.

    With `relevance` it is also given, for each chunk, how near a retriever found its passage to the question: passages
    are told apart far better by vectors of whole sentences than by those of a few tokens. It starts from that, too.
    """

    def __init__(
        self,
        vector_dim: int,
        hidden_size: int,
        layers: int,
        heads: int,
        share_kept: float,
        query: Query = "none",
        relevance: bool = False,
        encoder_digest: str | None = None,
    ) -> None:
        """Args: encoder_digest: of the encoder whose vectors it was trained on, where that is known."""
        super().__init__()
        self.share_kept, self.encoder_digest = share_kept, encoder_digest
        self.settings: dict[str, Any] = {
            "vector_dim": vector_dim,
            "hidden_size": hidden_size,
            "layers": layers,
            "heads": heads,
            "query": query,
            "relevance": relevance,
        }
        self.norm = nn.LayerNorm(vector_dim)
        self.inner = nn.Linear(vector_dim, hidden_size)
        layer = nn.TransformerEncoderLayer(
            hidden_size,
            heads,
            4 * hidden_size,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        score = nn.Linear(hidden_size, 1)
        self.head = nn.Sequential(nn.LayerNorm(hidden_size), score)
        # A fresh policy is uniform: training starts from random selection, or from what `fit` takes.
        nn.init.zeros_(score.weight)
        nn.init.zeros_(score.bias)
        if query == "question":
            self.question_mark = nn.Parameter(torch.zeros(hidden_size))
            self.match = nn.Linear(hidden_size, hidden_size, bias=False)
            nn.init.zeros_(self.match.weight)
            self.likeness = nn.Linear(len(NEIGHBOURHOODS), 1, bias=False)
            nn.init.constant_(self.likeness.weight, 1.0 / len(NEIGHBOURHOODS))
            self.lift = nn.Linear(len(NEIGHBOURHOODS), hidden_size, bias=False)
            self.center: Tensor
            self.metric: Tensor
            self.register_buffer("center", torch.zeros(vector_dim))
            self.register_buffer("metric", torch.zeros(vector_dim, vector_dim))
        if relevance:
            self.relevance = nn.Linear(RELEVANCE_FEATURES, 1, bias=False)
            self.relevance_lift = nn.Linear(RELEVANCE_FEATURES, hidden_size, bias=False)
            with torch.no_grad():
                self.relevance.weight.copy_(torch.eye(1, RELEVANCE_FEATURES))
            nn.init.zeros_(self.relevance_lift.weight)

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> None:
        """Take the metric from chunk vectors [n, dim]: their inverse covariance, small directions held back.

        Raises:
            RefragError: the vectors are all alike, so that they say nothing.
        """
        vectors = vectors.float()
        self.center.copy_(vectors.mean(0))
        away = vectors - self.center
        if float(away.abs().max()) < 1e-6:
            raise RefragError("the chunk vectors are all alike: the encoder has collapsed, or there is one chunk alone")
        values, directions = torch.linalg.eigh(away.t() @ away / len(away))
        held = values.clamp(min=0) + HELD_BACK * values.mean()
        self.metric.copy_((directions / held) @ directions.t())

    @property
    def reads_question(self) -> bool:
        """Whether a question changes its choice."""
        return self.settings["query"] == "question"

    @property
    def reads_relevance(self) -> bool:
        """Whether a retriever's view of the passages changes its choice."""
        return bool(self.settings["relevance"])

    def forward(
        self,
        vectors: Tensor,
        mask: Tensor | None = None,
        question: Tensor | None = None,
        question_mask: Tensor | None = None,
        relevance: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, L] for vectors [B, L, dim]; mask [B, L] is True at real chunks, the others get -inf.

        Args:
            question: [B, Q, dim], the vectors of the question's chunks; a policy that reads none ignores them.
            question_mask: [B, Q], True at real ones (None: all); a row may have none.
            relevance: [B, L], how near each chunk's passage is to the question by a retriever's unit vectors, NaN where
                that isn't known (None: nowhere); a policy that reads none ignores it.
        """
        content = self._content(vectors)
        states, seen, matched = content + _positions(content), mask, None
        chunks = torch.ones_like(content[..., 0], dtype=torch.bool) if mask is None else mask
        if self.reads_question:
            if question is None:
                # Masked, it changes nothing; but every weight has a gradient, which data-parallel training asks for.
                question, question_mask = torch.zeros_like(vectors[:, :1]), torch.zeros_like(vectors[:, :1, 0]).bool()
            elif question_mask is None:
                question_mask = torch.ones_like(question[..., 0], dtype=torch.bool)
            asked = self._content(question) * question_mask[..., None]
            states = torch.cat([asked + _positions(asked) + self.question_mark, states], 1)
            seen = torch.cat([question_mask, chunks], 1)
            mean = asked.sum(1) / question_mask.sum(1, keepdim=True).clamp(min=1)
            likeness = self._likeness(vectors, chunks, question, question_mask)
            matched = (content @ self.match(mean)[..., None])[..., 0] * content.shape[-1] ** -0.5
            matched = matched + self.likeness(likeness)[..., 0]
            states[:, -content.shape[1] :] += self.lift(likeness)
        if self.reads_relevance:
            told = _relevance_features(relevance, chunks)
            states[:, -content.shape[1] :] += self.relevance_lift(told)
            matched = self.relevance(told)[..., 0] + (0.0 if matched is None else matched)
        states = self.layers(states, src_key_padding_mask=None if seen is None else ~seen)
        logits = self.head(states[:, -content.shape[1] :])[..., 0].float()
        if matched is not None:
            logits = logits + matched.float()
        return logits if mask is None else logits.masked_fill(~mask, -math.inf)

    def _likeness(self, vectors: Tensor, chunks: Tensor, question: Tensor, question_mask: Tensor) -> Tensor:
        """[B, L, n]: how alike the question is to every chunk and its n neighbourhoods, in units of their spread."""
        with torch.autocast(vectors.device.type, enabled=False):
            asked = ((question.float() - self.center) * question_mask[..., None]).sum(1)
            product = ((vectors.float() - self.center) @ (asked @ self.metric)[..., None])[..., 0]
            return torch.stack([_standardized(_blurred(product, chunks, w), chunks) for w in NEIGHBOURHOODS], -1)

    def _content(self, vectors: Tensor) -> Tensor:
        """[B, n, hidden] of vectors [B, n, dim], wherever they stand."""
        return self.inner(self.norm(vectors.to(self.inner.weight.dtype)))

    def save(self, folder: Path) -> None:
        """Write policy.json and policy.safetensors into an existing folder."""
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()},
            folder / WEIGHTS_FILE,
        )
        settings = self.settings | {"share_kept": self.share_kept, "encoder_digest": self.encoder_digest}
        write_json(folder / SETTINGS_FILE, settings, sort_keys=True)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> PolicyNetwork:
        """The policy in `folder`, in evaluation mode.

        Raises:
            ArtifactError: the folder holds none, or one whose network was built otherwise.
        """
        try:
            settings: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(f"{folder} holds no policy: {SETTINGS_FILE} is missing") from None
        policy, weights = cls(**settings), load_file(folder / WEIGHTS_FILE)
        expected = policy.state_dict()
        if "metric" in expected and not LIKENESS & weights.keys():
            # From before there was a likeness: none is what it was trained with.
            weights |= {name: torch.zeros_like(expected[name]) for name in LIKENESS}
        if odd := sorted(expected.keys() ^ weights.keys()):
            raise ArtifactError(f"{folder / WEIGHTS_FILE} is of another policy network: it differs in {', '.join(odd)}")
        policy.load_state_dict(weights)
        return policy.to(device).eval()


def _positions(states: Tensor) -> Tensor:
    """Sinusoidal positions [n, width] for states [B, n, width]: a policy reads longer contexts than it learnt on."""
    length, width = states.shape[1:]
    half = width // 2
    rates = torch.exp(torch.arange(half, device=states.device) * (-math.log(10_000.0) / half))
    angles = torch.arange(length, device=states.device)[:, None] * rates
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width - 2 * half)).to(states.dtype)


def _relevance_features(relevance: Tensor | None, chunks: Tensor) -> Tensor:
    """[B, L, 3] of relevance [B, L], NaN where unknown: standardized, below the best, known; 0 where unknown."""
    if relevance is None:
        return torch.zeros(*chunks.shape, RELEVANCE_FEATURES, device=chunks.device)
    known = chunks & ~relevance.isnan()
    values = relevance.nan_to_num()
    best = values.masked_fill(~known, -math.inf).amax(1, keepdim=True)
    below = (values - best).masked_fill(~known, 0.0)
    return torch.stack([_standardized(values, known), below, known.to(values.dtype)], -1)


def _blurred(values: Tensor, mask: Tensor, width: int) -> Tensor:
    """Values [B, L] averaged over their neighbours where mask is True, weighed by a bell curve of `width` chunks."""
    if not width:
        return values
    offsets = torch.arange(-3 * width, 3 * width + 1, device=values.device)
    kernel = (-((offsets / width) ** 2)).exp()[None, None]
    both = torch.stack([values.masked_fill(~mask, 0.0), mask.to(values.dtype)], 1).flatten(0, 1)[:, None]
    summed = nn.functional.conv1d(both, kernel, padding=3 * width)[:, 0].unflatten(0, (len(values), 2))
    return summed[:, 0] / summed[:, 1].clamp(min=1e-6)


def _standardized(values: Tensor, mask: Tensor) -> Tensor:
    """Values [B, L] less their mean, over their standard deviation, of those where mask is True; 0 elsewhere."""
    count, real = mask.sum(1, keepdim=True).clamp(min=1), values.masked_fill(~mask, 0.0)
    away = (values - real.sum(1, keepdim=True) / count).masked_fill(~mask, 0.0)
    # Of chunks that are all alike rounding alone would be left.
    smallest = 1e-4 * real.abs().amax(1, keepdim=True) + 1e-9
    return away / (away.pow(2).sum(1, keepdim=True) / count).sqrt().clamp(min=smallest)


def budget(chunks: int, share: float) -> int:
    """T' = p L, rounded: how many of `chunks` chunks a share p keeps."""
    return min(chunks, round(share * chunks))


def select(logits: Tensor, mask: Tensor | None, share: float) -> Tensor:
    """The chunks to keep at inference: the top round(p L) by logit, deterministic.

    Args: logits [B, L]; mask [B, L], True at real chunks (None: all). Returns keep [B, L] bool.
    """
    real = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
    order = logits.masked_fill(~real, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(logits.shape[1], device=logits.device).expand_as(order)
    )
    budgets = torch.tensor([budget(int(count), share) for count in real.sum(1)], device=logits.device)
    return (rank < budgets[:, None]) & real


def sample_picks(
    logits: Tensor, picks: int, group: int, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> Tensor:
    """G Plackett-Luce draws of T' chunks in order, [B, G, T'], by Gumbel noise and top-T' over logits [B, L].

    Args: generator: one, or one for each row: then a row's draws depend neither on the other rows nor on its padding.
    """
    rows, chunks = logits.shape
    if isinstance(generator, Sequence):
        noise = torch.stack([torch.rand(chunks, group, generator=each).t() for each in generator])
    else:
        noise = torch.rand(rows, group, chunks, generator=generator)
    gumbel = -torch.log(-torch.log(noise.to(logits.device).clamp(1e-20, 1 - 1e-7)))
    return (logits[:, None] + gumbel).topk(picks, dim=-1).indices


def pick_log_probs(logits: Tensor, picks: Tensor, counted: Tensor | None = None) -> Tensor:
    """Log-probability of each pick given those before it: [B, G, T'] for logits [B, L], picks [B, G, T'].

    counted: [B, T'], True at the picks of a row's own budget (None: all); the others get 0.
    """
    chosen = nn.functional.one_hot(picks, logits.shape[-1])
    taken = chosen.cumsum(2) - chosen
    # Not -inf: a row with fewer chunks than T' would have nothing left to normalize.
    lowest = torch.finfo(logits.dtype).min
    steps = logits[:, None, None].masked_fill(taken.bool(), lowest).log_softmax(-1)
    picked = steps.gather(-1, picks[..., None])[..., 0]
    return picked if counted is None else picked.masked_fill(~counted[:, None], 0.0)


def keep_mask(picks: Tensor, chunks: int, counted: Tensor | None = None) -> Tensor:
    """Picks [B, G, T'] as flags [B, G, L]; counted [B, T'] as in `pick_log_probs`."""
    keep = torch.zeros(*picks.shape[:-1], chunks, dtype=torch.bool, device=picks.device)
    flags = torch.ones_like(picks, dtype=torch.bool) if counted is None else counted[:, None].expand(picks.shape)
    return keep.scatter_(-1, picks, flags)
