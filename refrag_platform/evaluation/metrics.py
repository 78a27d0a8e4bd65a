"""Metrics as pure functions: prefix log-perplexity, gap recovered, bootstrap intervals, exact match and F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# P_N: mean negative log-likelihood, in nats, of the first N tokens after the context.
PREFIXES = {"P16": 16, "P32": 32, "P128": 128, "P512": 512}
DECIMALS = 5
BOOTSTRAP_SAMPLES = 2000

Prefixes = dict[str, float | None]


def window_means(nll: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """P16, ... of each window, [windows]; those that reach beyond the output tokens are left out, without windows all.

    Args: nll [windows, output tokens], negative log-likelihoods in nats.
    """
    return {name: nll[:, :tokens].mean(1) for name, tokens in PREFIXES.items() if nll.size and tokens <= nll.shape[1]}


def log_perplexity(nll: NDArray[np.float64]) -> Prefixes:
    """P16 to P512 over all windows [windows, output tokens]; null beyond the output tokens."""
    means = window_means(nll)
    return {name: rounded(means[name].mean()) if name in means else None for name in PREFIXES}


def gap_recovered(
    none: Mapping[str, float | None], full: Mapping[str, float | None], system: Mapping[str, float | None]
) -> Prefixes:
    """(none - system) / (none - full) for each prefix: 1 is as good as the full context, 0 as good as none.

    Null where a figure is missing, or where the full context is no better than none.
    """
    recovered: Prefixes = {}
    for name in PREFIXES:
        without, whole, measured = none.get(name), full.get(name), system.get(name)
        if without is None or whole is None or measured is None or without <= whole:
            recovered[name] = None
        else:
            recovered[name] = rounded((without - measured) / (without - whole))
    return recovered


def bootstrap_interval(
    values: NDArray[np.float64],
    groups: Sequence[str],
    seed: int,
    level: float = 0.95,
    over: NDArray[np.float64] | None = None,
) -> list[float] | None:
    """Percentile interval [low, high] of the mean of `values`, resampling whole groups (documents) with replacement.

    Windows of one document are alike, so resampling windows would promise too much. None with one group.

    Args: seed: one for all figures that are compared: they are of the same draws. over: of the ratio of `values` to
        these, summed, in place of the mean.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return None
    sums, counts = np.bincount(member, weights=values), np.bincount(member, weights=over)
    picks = np.random.default_rng(seed).integers(0, len(names), (BOOTSTRAP_SAMPLES, len(names)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return [rounded(low), rounded(high)]


def mean_gain(gains: NDArray[np.float64], groups: Sequence[str], seed: int) -> list[float | None]:
    """[mean, low, high] of paired differences, as of `bootstrap_interval`; no ends with one group."""
    return [rounded(gains.mean()), *(bootstrap_interval(gains, groups, seed) or (None, None))]


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def judgeable(references: Sequence[str]) -> list[str]:
    """The references by which an answer can be judged: of "The" or "!" normalization leaves nothing.

    An empty answer would match those.
    """
    return [reference for reference in references if normalize_answer(reference)]


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals one of the references after normalization, else 0; one that is `judgeable`."""
    return float(any(normalize_answer(answer) == normalize_answer(reference) for reference in judgeable(references)))


def set_match(answer: str, references: Sequence[str]) -> float:
    """1 where exact match is, or where the answer lists what a reference does in another order; commas part a list."""
    listed = _listed(answer)
    return max(exact_match(answer, references), float(any(listed == _listed(one) for one in judgeable(references))))


def _listed(text: str) -> Counter[str]:
    return Counter(part for one in text.split(",") if (part := normalize_answer(one)))


def f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall against the nearest reference, 0 to 1."""
    return max((_f1(answer, reference) for reference in references), default=0.0)


def _f1(answer: str, reference: str) -> float:
    answered, wanted = normalize_answer(answer).split(), normalize_answer(reference).split()
    if not answered or not wanted:
        return 0.0
    common = sum((Counter(answered) & Counter(wanted)).values())
    return 2 * common / (len(answered) + len(wanted))


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words with the nearest reference, 0 to 1 (ROUGE-L)."""
    return max((_rouge_l(_words(answer), _words(reference)) for reference in references), default=0.0)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _rouge_l(answered: list[str], wanted: list[str]) -> float:
    if not answered or not wanted:
        return 0.0
    # Row by row: common[j] is the longest common subsequence of the words so far and the first j wanted ones.
    common = [0] * (len(wanted) + 1)
    for word in answered:
        diagonal = 0
        for place, other in enumerate(wanted, 1):
            above = common[place]
            common[place] = diagonal + 1 if word == other else max(above, common[place - 1])
            diagonal = above
    return 2 * common[-1] / (len(answered) + len(wanted))


# How an answer says that there is none: the words of fine-tuning, and those that an untuned model finds.
_REFUSAL = re.compile(
    r"\b(do(es)? not|don['’]t|doesn['’]t|did not|didn['’]t|can ?not|can['’]t|unable to|not able to)\b.{0,40}"
    r"\b(say|have|know|contain|provide|mention|specify|state|answer|determine|find|confirm|include)\b"
    r"|\b(no|not enough|insufficient) (specific )?information\b"
    r"|\bnot (mentioned|provided|specified|stated|given|available)\b",
    re.IGNORECASE,
)


def is_refusal(answer: str) -> bool:
    """Whether an answer says that the passages hold none, by its wording."""
    return _REFUSAL.search(answer) is not None


def rounded(value: Any) -> float:
    """A figure as reports give it; the digits beyond are noise of the arithmetic's order."""
    return round(float(value), DECIMALS)
