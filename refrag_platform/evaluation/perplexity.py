"""Log-perplexity after a compressed context against its controls: `refrag evaluate perplexity --help`.

Every system predicts the same tokens of the same windows, so differences are paired. Intervals resample
documents. The gap recovered is counted against tuned controls only: untuned ones flatter several times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from refrag_platform.errors import RefragError
from refrag_platform.evaluation.items import ItemSet, windows_digest
from refrag_platform.evaluation.metrics import (
    PREFIXES,
    bootstrap_interval,
    gap_recovered,
    log_perplexity,
    mean_gain,
    window_means,
)
from refrag_platform.evaluation.scoring import PLAIN_SYSTEMS, ChunkSource, PlainSystem, score_plain, score_refrag
from refrag_platform.evaluation.windows import Windows
from refrag_platform.model.loading import load_control
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel
from refrag_platform.progress import Progress


@dataclass(frozen=True)
class Likelihoods:
    """One system's negative log-likelihoods, [W, o] nats; [0, 0] where the system can't be had."""

    system: str
    tuned: bool
    share_kept: float | None
    nll: NDArray[np.float64]

    def __post_init__(self) -> None:
        if not np.isfinite(self.nll).all():
            raise RefragError(
                f"system {self.system} gives log-likelihoods that are not finite: its training has diverged; "
                "train it again with lower learning rates"
            )


def evaluate_perplexity(
    model: RefragModel,
    policy: PolicyNetwork | None,
    windows: Windows,
    *,
    untuned: PreTrainedModel,
    controls: Mapping[PlainSystem, Path] | None = None,
    shares: Sequence[float] = (0.0,),
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Rows, gap recovered, intervals and paired differences of all systems.

    Args:
        untuned: the decoder as it was before any training here.
        controls: model folders of the tuned controls, by system.
        shares: shares p of chunks kept as tokens, a refrag row for each; the first is the one compared.

    Raises:
        RefragError: a system's log-likelihoods are not finite.

    Returns:
        rows: {system, tuned, k, share_kept, P16, P32, P128, P512, windows}, nats; null beyond the output.
        gap_recovered: {P16, ...} of the first refrag row, null without tuned full and none controls.
        gap_intervals: for each of these, its 95% interval [low, high].
        intervals: for each row, 95% intervals [low, high] of P16, ...
        differences: paired gains of refrag in nats, {over, tuned, P16: [mean, low, high], ...}.
        items: P16, ... of every window for the first refrag row, see `items.ItemSet`.
    """
    controls = controls or {}
    runs = len(PLAIN_SYSTEMS) + len(controls) + len(shares) + 3
    scores: list[Likelihoods] = []
    size, start = model.chunk_size, model.start_token_id
    with Progress("perplexity", runs * len(windows), "windows") as progress:

        def plain(decoder: PreTrainedModel, read: PlainSystem, tuned: bool, system: str | None = None) -> None:
            progress.update(0, system or f"{read}{' (tuned)' if tuned else ''}")
            nll = score_plain(decoder, read, windows, size, start, batch_size, progress)
            scores.append(Likelihoods(system or read, tuned, None, nll))

        def refrag(system: str, share: float, chunks: ChunkSource = "own") -> None:
            progress.update(0, system)
            nll = np.empty((0, 0))
            if chunks != "another" or windows.of_another_document() is not None:
                nll = score_refrag(model, policy, windows, share, batch_size, chunks, seed, progress)
            scores.append(Likelihoods(system, True, share, nll))

        for system in PLAIN_SYSTEMS:
            plain(untuned, system, tuned=False)
        for system, folder in controls.items():
            plain(load_control(folder, like=model).decoder, system, tuned=True)
        for share in shares:
            refrag("refrag", share)
        refrag("refrag_shuffled", 0.0, "another")
        refrag("refrag_zero", 0.0, "zero")
        plain(model.decoder, "none", True, "refrag_none")
    return _report(scores, windows, size, seed)


def window_items(nll: NDArray[np.float64], windows: Windows) -> ItemSet:
    """P16, ... of every window, from [W, o] nats; without those that reach beyond the output tokens."""
    return ItemSet.of(windows_digest(windows), windows.documents, window_means(nll))


def _report(scores: Sequence[Likelihoods], windows: Windows, chunk_size: int, seed: int) -> dict[str, Any]:
    rows = [_row(score, chunk_size) for score in scores]
    compared = next(score for score in scores if score.system == "refrag")
    by_name = {
        (score.system, score.tuned): row for score, row in zip(scores, rows, strict=True) if score is not compared
    }
    refrag = rows[list(scores).index(compared)]
    recovered = gap_recovered(by_name.get(("none", True), {}), by_name.get(("full", True), {}), refrag)
    return {
        "rows": rows,
        "gap_recovered": recovered,
        "gap_intervals": _gap_intervals(recovered, scores, compared, windows, seed),
        "intervals": [_intervals(score, windows, seed) for score in scores],
        "differences": [
            _difference(score, compared, windows, seed)
            for score in scores
            if score.system in {"none", "truncated", "refrag_shuffled", "refrag_zero", "refrag_none"}
        ],
        "documents_used": len(set(windows.documents)),
        "items": window_items(compared.nll, windows).model_dump(),
    }


def _row(score: Likelihoods, chunk_size: int) -> dict[str, Any]:
    return {
        "system": score.system,
        "tuned": score.tuned,
        "k": chunk_size,
        "share_kept": score.share_kept,
        **log_perplexity(score.nll),
        "windows": len(score.nll),
    }


def _intervals(score: Likelihoods, windows: Windows, seed: int) -> dict[str, Any]:
    means = window_means(score.nll)
    return {
        "system": score.system,
        "tuned": score.tuned,
        "share_kept": score.share_kept,
        **{
            name: bootstrap_interval(means[name], windows.documents, seed) if name in means else None
            for name in PREFIXES
        },
    }


def _gap_intervals(
    recovered: Mapping[str, float | None],
    scores: Sequence[Likelihoods],
    refrag: Likelihoods,
    windows: Windows,
    seed: int,
) -> dict[str, list[float] | None]:
    """The documents' share in the gap and in what is recovered of it is resampled together."""
    means = {score.system: window_means(score.nll) for score in (*scores, refrag) if score.tuned}

    def interval(name: str) -> list[float] | None:
        none, full, ours = (means[system][name] for system in ("none", "full", "refrag"))
        return bootstrap_interval(none - ours, windows.documents, seed, over=none - full)

    return {name: None if share is None else interval(name) for name, share in recovered.items()}


def _difference(worse: Likelihoods, refrag: Likelihoods, windows: Windows, seed: int) -> dict[str, Any]:
    """How much lower refrag is, window by window: above zero means better."""
    one, other = window_means(worse.nll), window_means(refrag.nll)
    gains = {name: mean_gain(one[name] - other[name], windows.documents, seed) for name in one if name in other}
    return {"over": worse.system, "tuned": worse.tuned, **{name: gains.get(name) for name in PREFIXES}}
