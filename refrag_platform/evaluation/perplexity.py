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
    prefix_name,
    window_means,
)
from refrag_platform.evaluation.scoring import PLAIN_SYSTEMS, ChunkSource, PlainSystem, score_plain, score_refrag
from refrag_platform.evaluation.windows import Windows
from refrag_platform.model.loading import load_control
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel
from refrag_platform.progress import Progress


@dataclass(frozen=True)
class Scores:
    """One system's negative log-likelihoods, [W, o] nats; None where the system can't be had."""

    system: str
    tuned: bool
    share_kept: float | None
    nll: NDArray[np.float64] | None

    def __post_init__(self) -> None:
        if self.nll is not None and not np.isfinite(self.nll).all():
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
    scores: list[Scores] = []
    size, start = model.chunk_size, model.start_token_id
    with Progress("perplexity", runs * len(windows), "windows") as progress:

        def plain(decoder: PreTrainedModel, read: PlainSystem, tuned: bool, system: str | None = None) -> None:
            progress.update(0, system or f"{read}{' (tuned)' if tuned else ''}")
            nll = score_plain(decoder, read, windows, size, start, batch_size, progress)
            scores.append(Scores(system or read, tuned, None, nll))

        def refrag(system: str, share: float, chunks: ChunkSource = "own") -> None:
            progress.update(0, system)
            nll = None
            if chunks != "another" or windows.of_another_document() is not None:
                nll = score_refrag(model, policy, windows, share, batch_size, chunks, seed, progress)
            scores.append(Scores(system, True, share, nll))

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


def window_items(nll: NDArray[np.float64] | None, windows: Windows) -> ItemSet:
    """P16, ... of every window, from [W, o] nats; without those that reach beyond the output tokens."""
    means = {prefix_name(tokens): None if nll is None else window_means(nll, tokens) for tokens in PREFIXES}
    measured = {name: values for name, values in means.items() if values is not None}
    return ItemSet.of(windows_digest(windows), windows.documents, measured)


def _report(scores: Sequence[Scores], windows: Windows, chunk_size: int, seed: int) -> dict[str, Any]:
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


def _row(score: Scores, chunk_size: int) -> dict[str, Any]:
    nll = np.empty((0, 0)) if score.nll is None else score.nll
    return {
        "system": score.system,
        "tuned": score.tuned,
        "k": chunk_size,
        "share_kept": score.share_kept,
        **log_perplexity(nll),
        "windows": len(nll),
    }


def _intervals(score: Scores, windows: Windows, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = {"system": score.system, "tuned": score.tuned, "share_kept": score.share_kept}
    for tokens in PREFIXES:
        means = None if score.nll is None else window_means(score.nll, tokens)
        row[prefix_name(tokens)] = None if means is None else bootstrap_interval(means, windows.documents, seed)
    return row


def _gap_intervals(
    recovered: Mapping[str, float | None], scores: Sequence[Scores], refrag: Scores, windows: Windows, seed: int
) -> dict[str, list[float] | None]:
    """The documents' share in the gap and in what is recovered of it is resampled together."""
    compared = {score.system: score.nll for score in (*scores, refrag) if score.tuned and score.nll is not None}
    intervals: dict[str, list[float] | None] = {}
    for tokens in PREFIXES:
        means = {system: window_means(nll, tokens) for system, nll in compared.items()}
        none, full, ours = (means.get(system) for system in ("none", "full", "refrag"))
        interval = None
        if recovered[prefix_name(tokens)] is not None and none is not None and full is not None and ours is not None:
            interval = bootstrap_interval(none - ours, windows.documents, seed, over=none - full)
        intervals[prefix_name(tokens)] = interval
    return intervals


def _difference(worse: Scores, refrag: Scores, windows: Windows, seed: int) -> dict[str, Any]:
    """How much lower refrag is, window by window: above zero means better."""
    row: dict[str, Any] = {"over": worse.system, "tuned": worse.tuned}
    for tokens in PREFIXES:
        one = None if worse.nll is None else window_means(worse.nll, tokens)
        other = None if refrag.nll is None else window_means(refrag.nll, tokens)
        gains = None if one is None or other is None else one - other
        row[prefix_name(tokens)] = None if gains is None else mean_gain(gains, windows.documents, seed)
    return row
