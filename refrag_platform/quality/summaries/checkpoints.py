"""Summary rows of a model folder: one per weight file, per part of the model, of its training, of its vectors."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

from refrag_platform.errors import ArtifactError
from refrag_platform.quality.summaries.artifact import Artifact, SummaryRow, is_finite, read_json, wanted
from refrag_platform.stages import SHIPPED

TRAINING_FILE = "training.json"
CHUNKS_TRIED = 256
# Kept beside the parameters: a copy of the untrained decoder's embeddings, and a head tied to its embeddings.
NOT_PARAMETERS = {"encoder": {"encoder.decoder_embeddings"}, "decoder": {"lm_head.weight"}}


def files(artifact: Artifact) -> list[SummaryRow]:
    """The parts of a model folder."""
    return artifact.files(["model.json", "encoder.safetensors", "decoder/*.safetensors", "tokenizer/*", TRAINING_FILE])


def weights(artifact: Artifact) -> list[SummaryRow]:
    """One row per .safetensors file, read tensor by tensor, for it need not fit into memory: non-finite numbers."""
    from safetensors import safe_open

    rows = []
    for path in _weight_files(artifact.content):
        row = {"row": path.relative_to(artifact.content).as_posix(), "parameters": 0, "nonfinite": 0}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = file.get_tensor(name)
                row["parameters"] += tensor.numel()
                if tensor.is_floating_point():
                    row["nonfinite"] += tensor.numel() - int(tensor.isfinite().sum())
        rows.append(row)
    return rows


def parameters(artifact: Artifact) -> list[SummaryRow]:
    """One row per part (encoder, projection, decoder): parameters in its files and in training.json."""
    from safetensors import safe_open

    tied = _ties_its_head(artifact.content)
    counted: dict[str, int] = defaultdict(int)
    for path in _weight_files(artifact.content):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = _part(artifact.content, path, name)
                if name not in NOT_PARAMETERS.get(part, ()) or (part == "decoder" and not tied):
                    counted[part] += math.prod(file.get_slice(name).get_shape())
    stated = wanted(artifact.read_json(TRAINING_FILE), "parameters", TRAINING_FILE)
    return [{"row": part, "found": counted.get(part, 0), "stated": count} for part, count in stated.items()]


def training(artifact: Artifact) -> list[SummaryRow]:
    """The one row of what training.json states about the run.

    before, after: the loss of the same batches before and after the training; of a release, which states none, what
    the log of its training began and ended with.
    """
    values = artifact.read_json(TRAINING_FILE)
    first, last = (wanted(values, key, TRAINING_FILE) for key in ("first_loss", "last_loss"))
    before, after = values.get("loss_before", first), values.get("loss_after", last)
    settings = getattr(artifact.recipe, artifact.stage)
    stated = wanted(values, "steps", TRAINING_FILE)
    # The release was trained as its own recipe said.
    asked = stated if getattr(settings, "continue_from", None) == SHIPPED else settings.steps
    return [
        {
            "row": artifact.stage,
            "before": before,
            "after": after,
            "loss_faults": sum(not is_finite(loss) for loss in (first, last, before, after)),
            "steps_missing": asked - stated,
        }
    ]


def vectors(artifact: Artifact) -> list[SummaryRow]:
    """The one row of what the loaded encoder makes of the corpus' first chunks.

    spread: standard deviation over chunks of what the decoder reads, relative to its root mean square; a
    collapsed encoder says the same of every chunk, whatever its loss.
    """
    import torch

    from refrag_platform.corpus.shards import TokenShards
    from refrag_platform.model.refrag import RefragModel

    model = RefragModel.load(artifact.content)
    tokens = TokenShards(artifact.inputs["corpus"], "train")
    count = min(CHUNKS_TRIED, tokens.total // model.chunk_size)
    if count < 2:
        raise ArtifactError("the corpus has no two chunks to try the encoder on")
    ids = torch.from_numpy(tokens.tokens(0, count * model.chunk_size)).view(count, model.chunk_size)
    with torch.no_grad():
        embeds = model.project(model.encode(ids)).float()
    usable = embeds[embeds.isfinite().all(1)]
    spread = usable.std(0, correction=0).square().mean().sqrt() / usable.square().mean().sqrt().clamp(min=1e-12)
    return [
        {
            "row": f"{count} chunks",
            "nonfinite": count - len(usable),
            "spread": float(spread),
            "encoder_digest": model.encoder.digest(),
            "encoder_digest_stated": wanted(artifact.read_json("model.json"), "encoder_digest", "model.json"),
        }
    ]


def _weight_files(content: Path) -> list[Path]:
    return sorted(content.rglob("*.safetensors"))


def _part(content: Path, path: Path, tensor: str) -> str:
    """decoder/*.safetensors is the decoder; encoder.safetensors holds two parts, told apart by prefix."""
    if path.parent != content:
        return path.parent.name
    return tensor.split(".")[0] if path.stem == "encoder" else path.stem


def _ties_its_head(content: Path) -> bool:
    config = content / "decoder" / "config.json"
    return config.is_file() and bool(read_json(config).get("tie_word_embeddings", False))
