"""How a trained artifact came to be, in a sentence: what its settings and its figures say together."""

from __future__ import annotations

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.stages import SHIPPED, takes_over


def origin(manifest: Manifest) -> str | None:
    """`40 steps, the decoder frozen`, `900 steps; taken as it is from models/NAME/release`; None: not trained."""
    settings, steps = manifest.settings.get(manifest.stage, {}), manifest.metrics.get("steps")
    if steps is None:
        return None
    trained, start = f"{steps:,} steps", settings.get("continue_from")
    place = f"models/{manifest.model}/{SHIPPED}" if start == SHIPPED else f"{manifest.model}@{start}"
    if takes_over(manifest.stage, start):
        return f"{trained}; taken as it is from {place}"
    if "train_decoder" in settings:
        trained += f", the decoder {'trained too' if settings['train_decoder'] else 'frozen'}"
    return trained if start is None else f"{trained}, on from {place}"
