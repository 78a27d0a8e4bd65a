"""Summary rows of a policy: one per weight file, and one per length of context that it is tried on."""

from __future__ import annotations

from refrag_platform.quality.summaries.artifact import Artifact, SummaryRow, read_json, wanted
from refrag_platform.quality.summaries.checkpoints import TRAINING_FILE
from refrag_platform.quality.summaries.checkpoints import training as training
from refrag_platform.quality.summaries.checkpoints import weights as weights

TRIED_LENGTHS = (8, 32, 128)
CONTEXTS_PER_LENGTH = 4


def files(artifact: Artifact) -> list[SummaryRow]:
    """Facts and weights."""
    return artifact.files(["policy.json", "policy.safetensors", TRAINING_FILE])


def scores(artifact: Artifact) -> list[SummaryRow]:
    """One row per number of chunks L: the policy scores standard normal vectors and keeps its share."""
    import torch

    from refrag_platform.model.policy import PolicyNetwork, select

    policy = PolicyNetwork.load(artifact.content)
    facts = artifact.read_json("policy.json")
    share = wanted(facts, "share_kept", "policy.json")
    generator = torch.Generator().manual_seed(artifact.recipe.seed)
    rows = []
    for length in TRIED_LENGTHS:
        vectors = torch.randn(CONTEXTS_PER_LENGTH, length, facts["vector_dim"], generator=generator)
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


def budget(artifact: Artifact) -> list[SummaryRow]:
    """The one row of what the policy was made for: its share of chunks and the encoder's vectors."""
    facts = artifact.read_json("policy.json")
    model = read_json(artifact.inputs["finetuned"] / "model.json")
    return [
        {
            "row": "policy",
            "share_kept": wanted(facts, "share_kept", "policy.json"),
            "share_of_recipe": artifact.recipe.policy.share_kept,
            "vector_dim": wanted(facts, "vector_dim", "policy.json"),
            "vector_dim_of_encoder": wanted(model, "vector_dim", "model.json of finetuned"),
            "encoder_digest": wanted(facts, "encoder_digest", "policy.json"),
            "encoder_digest_of_model": wanted(model, "encoder_digest", "model.json of finetuned"),
        }
    ]
