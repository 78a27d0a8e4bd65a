"""The policy: which chunks of a context stay tokens (appendix A.1).

A small transformer over the chunk vectors gives one logit per chunk, once. Picking T' chunks one after
another without replacement, masking those already picked, is a Plackett-Luce draw: Gumbel noise and a
top-T' sample it, and its log-probability is a sum of masked log-softmax terms.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refrag_platform.errors import ArtifactError

SETTINGS_FILE, WEIGHTS_FILE = "policy.json", "policy.safetensors"


class PolicyNetwork(nn.Module):
    """Two transformer layers and a linear head over chunk vectors."""

    def __init__(self, vector_dim: int, hidden_size: int, layers: int, heads: int, share_kept: float) -> None:
        super().__init__()
        self.share_kept = share_kept
        self._settings = {
            "vector_dim": vector_dim,
            "hidden_size": hidden_size,
            "layers": layers,
            "heads": heads,
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
        # A fresh policy is uniform: training starts from random selection.
        nn.init.zeros_(score.weight)
        nn.init.zeros_(score.bias)

    def forward(self, vectors: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, L] for vectors [B, L, dim]; mask [B, L] is True at real chunks, the others get -inf."""
        states = self.inner(self.norm(vectors.to(self.inner.weight.dtype)))
        states = states + _positions(states.shape[1], states.shape[2], states.device).to(states.dtype)
        states = self.layers(states, src_key_padding_mask=None if mask is None else ~mask)
        logits = self.head(states)[..., 0].float()
        return logits if mask is None else logits.masked_fill(~mask, -math.inf)

    def save(self, folder: Path) -> None:
        """Write policy.json and policy.safetensors into an existing folder."""
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()},
            folder / WEIGHTS_FILE,
        )
        settings = self._settings | {"share_kept": self.share_kept}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> PolicyNetwork:
        """The policy in `folder`, in evaluation mode.

        Raises:
            ArtifactError: the folder holds none.
        """
        try:
            settings: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(f"{folder} holds no policy: {SETTINGS_FILE} is missing") from None
        policy = cls(**settings)
        policy.load_state_dict(load_file(folder / WEIGHTS_FILE))
        return policy.to(device).eval()


def _positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal positions [length, width]: a policy can be run on longer contexts than it was trained on."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=device) * (-math.log(10_000.0) / half))
    angles = torch.arange(length, device=device)[:, None] * rates
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width - 2 * half))


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


def sample_picks(logits: Tensor, picks: int, group: int, generator: torch.Generator | None = None) -> Tensor:
    """G Plackett-Luce draws of T' chunks in order, [B, G, T'], by Gumbel noise and top-T' over logits [B, L]."""
    noise = torch.rand(logits.shape[0], group, logits.shape[1], generator=generator, device="cpu").to(logits.device)
    gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
    return (logits[:, None] + gumbel).topk(picks, dim=-1).indices


def pick_log_probs(logits: Tensor, picks: Tensor) -> Tensor:
    """Log-probability of each pick given those before it: [B, G, T'] for logits [B, L], picks [B, G, T']."""
    chosen = nn.functional.one_hot(picks, logits.shape[-1])
    taken = chosen.cumsum(2) - chosen
    steps = logits[:, None, None].masked_fill(taken.bool(), -math.inf).log_softmax(-1)
    return steps.gather(-1, picks[..., None])[..., 0]


def keep_mask(picks: Tensor, chunks: int) -> Tensor:
    """Picks [..., T'] as flags [..., L]."""
    keep = torch.zeros(*picks.shape[:-1], chunks, dtype=torch.bool, device=picks.device)
    return keep.scatter_(-1, picks, True)
