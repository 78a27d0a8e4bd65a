"""Summary rows of a model folder: one per weight file, per part of the model, and one of its training."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from refrag_platform.errors import ArtifactError
from refrag_platform.quality.summaries.artifact import Artifact, Row, Table, is_finite, wanted

TRAINING_FILE = "training.json"


def files(artifact: Artifact) -> list[Row]:
    """The parts of a model folder; the fine-tuned model carries its policy too."""
    names = ["model.json", "encoder.safetensors", "tokenizer/*", TRAINING_FILE]
    if artifact.stage != "reconstruction":
        names.append("decoder/*.safetensors")
    if artifact.stage == "finetuned":
        names += ["policy.json", "policy.safetensors"]
    return artifact.files(names)


def weights(artifact: Artifact) -> list[Row]:
    """One row per .safetensors file, read tensor by tensor: tensors, parameters, non-finite numbers."""
    paths = sorted(artifact.content.rglob("*.safetensors"))
    return [_weights_row(artifact.content, path) for path in paths]


def _weights_row(content: Path, path: Path) -> Row:
    from safetensors import safe_open

    tensors = parameters = nonfinite = 0
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            tensor = file.get_tensor(name)
            tensors, parameters = tensors + 1, parameters + tensor.numel()
            if tensor.is_floating_point():
                nonfinite += tensor.numel() - int(tensor.isfinite().sum())
    return {
        "row": path.relative_to(content).as_posix(),
        "tensors": tensors,
        "parameters": parameters,
        "nonfinite": nonfinite,
        "empty": int(parameters == 0),
    }


def parameters(artifact: Artifact) -> list[Row]:
    """One row per part (encoder, projection, decoder): parameters in the files and as training.json states."""
    from safetensors import safe_open

    found: dict[str, int] = defaultdict(int)
    for path in sorted(artifact.content.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = path.parent.name if path.parent != artifact.content else name.split(".")[0]
                shape = file.get_slice(name).get_shape()
                count = 1
                for size in shape:
                    count *= size
                found[part] += count
    stated = wanted(artifact.read_json(TRAINING_FILE), "parameters", TRAINING_FILE)
    return [
        {"row": part, "found": found.get(part, 0), "stated": count}
        for part, count in stated.items()
        if part != "decoder" or part in found
    ]


def training(artifact: Artifact) -> list[Row]:
    """The one row of what training.json states about the run."""
    values = artifact.read_json(TRAINING_FILE)
    first, last = (wanted(values, key, TRAINING_FILE) for key in ("first_loss", "last_loss"))
    asked = getattr(artifact.recipe, artifact.stage).steps
    if "chunk_vector_std" not in values:
        raise ArtifactError(f"{TRAINING_FILE} has no 'chunk_vector_std': collapse of the encoder can't be ruled out")
    return [
        {
            "row": artifact.stage,
            "first_loss": first,
            "last_loss": last,
            "loss_faults": sum(not is_finite(loss) for loss in (first, last)),
            "steps_missing": asked - wanted(values, "steps", TRAINING_FILE),
            "chunk_vector_std": values["chunk_vector_std"],
        }
    ]


TABLES: dict[str, Table] = {"files": files, "weights": weights, "parameters": parameters, "training": training}
