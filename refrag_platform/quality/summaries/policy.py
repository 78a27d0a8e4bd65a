"""Summary rows of a policy: one per weight file, and one per length of context that it is tried on."""

from __future__ import annotations

from refrag_platform.quality.summaries import checkpoints
from refrag_platform.quality.summaries.artifact import Artifact, Row, Table, wanted

TRIED_LENGTHS = (8, 32, 128)
CONTEXTS_PER_LENGTH = 4


def files(artifact: Artifact) -> list[Row]:
    """Facts and weights."""
    return artifact.files(["policy.json", "policy.safetensors"])


def scores(artifact: Artifact) -> list[Row]:
    """One row per number of chunks L: the policy scores standard normal vectors and keeps its share of them."""
    import torch

    from refrag_platform.model.policy import PolicyNetwork, select

    policy = PolicyNetwork.load(artifact.content)
    facts = artifact.read_json("policy.json")
    share = wanted(facts, "share_kept", "policy.json")
    generator = torch.Generator().manual_seed(artifact.recipe.seed)
    rows = []
    for length in TRIED_LENGTHS:
        vectors = torch.randn(CONTEXTS_PER_LENGTH, length, policy.vector_dim, generator=generator)
        mask = torch.ones(CONTEXTS_PER_LENGTH, length, dtype=torch.bool)
        with torch.no_grad():
            logits = policy(vectors, mask).float()
        finite = logits.isfinite()
        rows.append(
            {
                "row": f"{length} chunks",
                "nonfinite": int((~finite).sum()),
                "spread": float(logits.std(dim=1).mean()) if finite.all() else 0.0,
                "kept": int(select(logits.nan_to_num(), mask, share).sum()),
                "budget": CONTEXTS_PER_LENGTH * round(artifact.recipe.policy.share_kept * length),
            }
        )
    return rows


def budget(artifact: Artifact) -> list[Row]:
    """The one row of the share of chunks that the policy was trained to keep."""
    stated = wanted(artifact.read_json("policy.json"), "share_kept", "policy.json")
    return [{"row": "policy", "share_kept": stated, "share_of_recipe": artifact.recipe.policy.share_kept}]


TABLES: dict[str, Table] = {"files": files, "weights": checkpoints.weights, "scores": scores, "budget": budget}
