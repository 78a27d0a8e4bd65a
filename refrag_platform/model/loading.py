"""From a model's name or folder to a model that is ready to use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from refrag_platform.errors import ArtifactError
from refrag_platform.model.digests import weights_digest
from refrag_platform.model.policy import SETTINGS_FILE as POLICY_FILE
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import SETTINGS_FILE, RefragModel
from refrag_platform.project import Project


@dataclass(frozen=True)
class Bundle:
    """A model with the policy that was trained for it, if there is one."""

    model: RefragModel
    policy: PolicyNetwork | None
    folder: Path

    @property
    def share_kept(self) -> float:
        """The budget p that the policy was trained with; 0 without a policy."""
        return self.policy.share_kept if self.policy else 0.0

    def digests(self) -> dict[str, str | None]:
        """Hashes of all weights that answer: decoder, encoder, projection and policy (None where there is none)."""
        return {
            "decoder": weights_digest(self.model.decoder),
            "encoder": self.model.encoder_digest(),
            "projection": weights_digest(self.model.projection),
            "policy": weights_digest(self.policy) if self.policy else None,
        }


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA; float32 on a CPU, where it is exact and no slower for one request."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_control(folder: Path, like: RefragModel) -> RefragModel:
    """A control in the type and on the device of the model it is held against.

    Raises:
        ArtifactError: its vocabulary is another, so that it does not predict the same tokens.
    """
    control = RefragModel.load(folder, like.dtype, like.device)
    if len(control.tokenizer) != len(like.tokenizer):
        raise ArtifactError(
            f"the control {folder} has {len(control.tokenizer)} tokens, the model {len(like.tokenizer)}; "
            "train it from the same recipe"
        )
    return control


def model_folder(name_or_dir: str, project: Project | None = None) -> Path:
    """The folder that holds model.json, for a model's name or a folder (with or without `content/`).

    Raises:
        ArtifactError: neither is there; the message says how to make it.
    """
    path = Path(name_or_dir)
    candidates = [path, path / "content"]
    remedy = f"`refrag run finetuned --model {name_or_dir}`"
    if len(path.parts) == 1:
        project = project or Project.find()
        if name_or_dir not in project.recipes():
            remedy = f"models: {', '.join(project.recipes())}"
        candidates.insert(0, project.content("finetuned", name_or_dir))
    for folder in candidates:
        if (folder / SETTINGS_FILE).is_file():
            return folder
    raise ArtifactError(
        f"no model at {name_or_dir!r}: it is neither a folder with {SETTINGS_FILE} nor a model whose fine-tuned "
        f"checkpoint has been made ({remedy})"
    )


def policy_folder(folder: Path) -> Path | None:
    """Where the policy of a model folder lies: in it, or for a pipeline's fine-tuned model in the artifact `policy`.

    None where a model comes without one.

    Raises:
        ArtifactError: the pipeline has not made it yet.
    """
    if (folder / POLICY_FILE).is_file():
        return folder
    stage = folder.resolve().parent
    if (stage.name, folder.resolve().name) != ("finetuned", "content"):
        return None
    artifact, name = stage.parent / "policy" / "content", stage.parent.name
    if not (artifact / POLICY_FILE).is_file():
        raise ArtifactError(f"{name} has no policy yet at {artifact}; make it with `refrag run policy --model {name}`")
    return artifact


def load_bundle(
    name_or_dir: str,
    project: Project | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    policy: Path | None = None,
    choosing: bool = True,
) -> Bundle:
    """Load a model and its policy in evaluation mode.

    Args:
        policy: the folder that holds it; default: as `policy_folder` finds it.
        choosing: whether chunks are to be chosen; else a model whose policy isn't trained yet, or was trained on
            another encoder's vectors, comes without one.

    Raises:
        ArtifactError: there is no such model, its policy is missing, or was trained on another encoder's vectors.
    """
    folder = model_folder(name_or_dir, project)
    target = torch.device(device) if device else default_device()
    model = RefragModel.load(folder, dtype or default_dtype(target), target)
    try:
        place = policy or policy_folder(folder)
    except ArtifactError:
        if choosing:
            raise
        place = None
    network = PolicyNetwork.load(place, target) if place else None
    # Packed weights hold a policy and its encoder together; an artifact of its own says whose vectors it learned from.
    known = (None, model.encoder_digest()) if place == folder else (model.encoder_digest(),)
    if network and network.encoder_digest not in known:
        if not choosing:
            return Bundle(model, None, folder)
        raise ArtifactError(
            f"the policy in {place} was trained on vectors of the encoder {network.encoder_digest}, and {folder} has "
            f"{model.encoder_digest()}; train it again, in a pipeline with `refrag run policy`"
        )
    return Bundle(model, network, folder)
