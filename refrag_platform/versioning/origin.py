"""How a trained artifact came to be, in a sentence: what its settings and its figures say together."""

from __future__ import annotations

from refrag_platform.stages import SHIPPED
from refrag_platform.versioning.manifest import Manifest


def origin(manifest: Manifest) -> str | None:
    """`40 steps of training, the decoder frozen`, `taken as it is from models/NAME/release: ...`; None: not trained."""
    settings, steps = manifest.settings.get(manifest.stage, {}), manifest.metrics.get("steps")
    if not isinstance(settings, dict) or steps is None:
        return None
    trained, start = f"{steps:,} steps of training", settings.get("continue_from")
    if start is not None and "steps" not in settings:
        place = f"models/{manifest.model}/{SHIPPED}" if start == SHIPPED else f"{manifest.model}@{start}"
        return f"taken as it is from {place}: {trained} there"
    if start is not None:
        trained += f" on from {manifest.model}@{start}"
    if "train_decoder" in settings:
        trained += f", the decoder {'trained too' if settings['train_decoder'] else 'frozen'}"
    return trained
