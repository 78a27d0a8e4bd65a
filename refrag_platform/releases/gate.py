"""May a model replace the released one? Figure by figure, on the same windows and questions.

A candidate passes a figure when the whole interval of its gain over the released model lies above minus the
tolerance: it is better, or so surely no worse than that. A tie that the held-out set can't settle is refused.
Intervals are paired bootstraps that resample documents. Of what is looked up in the chunk store, those questions count
whose gold passage the released version's store holds: new documents are no merit of a search.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from refrag_platform.errors import ArtifactError
from refrag_platform.evaluation.items import Items, ItemSet
from refrag_platform.evaluation.metrics import bootstrap_interval, rounded
from refrag_platform.recipes import ReleaseRecipe

Outcome = Literal["better", "within tolerance", "tie beyond tolerance", "worse", "missing", "other set", "first"]
PASSING: frozenset[Outcome] = frozenset({"better", "within tolerance", "first"})
SEED = 0  # the same values always give the same decision


@dataclass(frozen=True)
class Verdict:
    """One figure. `gain`: mean over items of how much better the candidate is, with its interval [low, high];
    nats for perplexities, shares of 1 for answers, negative where the candidate is worse."""

    metric: str
    outcome: Outcome
    tolerance: float
    candidate: float | None = None
    released: float | None = None
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    items: int = 0
    note: str = ""

    @property
    def passes(self) -> bool:
        return self.outcome in PASSING

    def __str__(self) -> str:
        if self.gain is None:
            return f"{self.metric} {self.note or self.outcome}"
        interval = "" if self.low is None else f" [{self.low:+.4f}, {self.high:+.4f}]"
        figures = f"gain {self.gain:+.4f}{interval}, tolerance {self.tolerance:g}, {self.items} items"
        return f"{self.metric} {self.note or self.outcome} ({figures})"


@dataclass(frozen=True)
class Decision:
    """Whether a candidate may be released, the figures, and why in one sentence."""

    promoted: bool
    reason: str
    verdicts: tuple[Verdict, ...]
    confidence: float

    @property
    def needs_again(self) -> bool:
        """Whether the released version's figures don't pair with the candidate's, but could be measured again."""
        return any(
            verdict.outcome == "other set" or (verdict.outcome == "missing" and verdict.candidate is not None)
            for verdict in self.verdicts
        )

    def plain(self) -> dict[str, Any]:
        """The decision as JSON values."""
        return asdict(self) | {"verdicts": [asdict(verdict) for verdict in self.verdicts]}


def decide(candidate: Items, released: Items | None, rules: ReleaseRecipe) -> Decision:
    """Compare a candidate with the released model (None: there is none yet) on every figure that `rules` name.

    Raises:
        ArtifactError: one of them has another number of items for the same held-out set.
    """
    verdicts = tuple(
        _verdict(metric, tolerance, candidate.of_metric(metric), released, rules.confidence)
        for metric, tolerance in rules.tolerances.items()
    )
    refusing = [verdict for verdict in verdicts if not verdict.passes]
    if refusing:
        reason = f"refused: {'; '.join(map(str, refusing))}"
    elif released is None:
        reason = f"promoted as the first release: {', '.join(rules.tolerances)} are all there"
    else:
        reason = f"promoted: {'; '.join(map(str, verdicts))}"
    return Decision(not refusing, reason, verdicts, rules.confidence)


def _verdict(
    metric: str, tolerance: float, candidate: ItemSet | None, released: Items | None, confidence: float
) -> Verdict:
    known = None if released is None else released.of_metric(metric)
    # Each on what its own store holds; where the two are compared, on what the released one's holds.
    sets = {"candidate": candidate, "released": known}
    means: dict[str, Any] = {name: _mean(items and items.held_by(items), metric) for name, items in sets.items()}
    if candidate is None or not candidate.groups:
        note = "is missing from the candidate's evaluation" + _why_missing(metric)
        return Verdict(metric, "missing", tolerance, **means, note=note)
    means["items"] = len(candidate.groups)
    if released is None:
        return Verdict(metric, "first", tolerance, **means)
    if known is None:
        note = "is missing from the released model's evaluation" + _why_missing(metric)
        return Verdict(metric, "missing", tolerance, **means, note=note)
    if known.digest != candidate.digest:
        note = (
            f"was measured on another held-out set ({len(candidate.groups)} items {candidate.digest[:12]}, "
            f"the released model's {len(known.groups)} items {known.digest[:12]})"
        )
        return Verdict(metric, "other set", tolerance, **means, note=note)
    return _compared(metric, tolerance, candidate, known, confidence)


def _compared(metric: str, tolerance: float, candidate: ItemSet, known: ItemSet, confidence: float) -> Verdict:
    if len(candidate.groups) != len(known.groups):
        raise ArtifactError(
            f"{metric}: {len(candidate.groups)} values of the candidate and {len(known.groups)} of the released model "
            f"for one held-out set ({known.digest[:12]}); evaluate both again"
        )
    candidate, known = candidate.held_by(known), known.held_by(known)
    new, old = np.array(candidate.values[metric]), np.array(known.values[metric])
    gains = old - new if metric.startswith("P") else new - old
    interval = bootstrap_interval(gains, candidate.groups, SEED, confidence)
    means = {"candidate": _mean(candidate, metric), "released": _mean(known, metric)}
    figures: dict[str, Any] = {**means, "gain": rounded(gains.mean()), "items": len(gains)}
    if interval is None:
        note = "can't be judged on a single document or question"
        return Verdict(metric, "tie beyond tolerance", tolerance, **figures, note=note)
    low, high = interval
    outcome: Outcome
    if low > 0:
        outcome = "better"
    elif low >= -tolerance:
        outcome = "within tolerance"
    else:
        outcome = "worse" if high < 0 else "tie beyond tolerance"
    return Verdict(metric, outcome, tolerance, **figures, low=low, high=high)


def _mean(items: ItemSet | None, metric: str) -> float | None:
    return rounded(np.mean(items.values[metric])) if items is not None and items.groups else None


def _why_missing(metric: str) -> str:
    """Perplexities reach no further than the tokens that are predicted, retrieval figures no further than the store."""
    if metric.startswith("retrieval_"):
        return (
            " (made before questions were looked up in the store, or the store holds no gold passage of any, or fewer "
            "passages than the figure looks at; give evaluation.question_file questions whose gold passages it holds, "
            f"or leave {metric} out of release.tolerances)"
        )
    return f" (evaluation.output_tokens must be {metric[1:]} or more)" if metric.startswith("P") else ""
