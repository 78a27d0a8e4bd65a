"""Metrics against cases computed by hand."""

import numpy as np
import pytest

from refrag_platform.evaluation.metrics import (
    bootstrap_interval,
    exact_match,
    f1,
    gap_recovered,
    is_refusal,
    judgeable,
    log_perplexity,
    normalize_answer,
    rouge_l,
)


def test_log_perplexity_is_the_mean_over_the_first_tokens_of_each_window() -> None:
    nll = np.concatenate([np.full((2, 16), 1.0), np.full((2, 16), 3.0), np.full((2, 8), 100.0)], axis=1)
    nll[1] += 1
    assert log_perplexity(nll) == {"P16": 1.5, "P32": 2.5, "P128": None, "P512": None}


def test_log_perplexity_of_no_windows_is_null() -> None:
    assert set(log_perplexity(np.empty((0, 0))).values()) == {None}


def test_gap_recovered_is_the_share_of_the_way_from_none_to_full() -> None:
    none, full = {"P16": 4.0, "P32": 4.0, "P128": 3.0}, {"P16": 3.0, "P32": 2.0, "P128": 3.1}
    system = {"P16": 3.25, "P32": 4.5, "P128": 2.0}
    # P128: the full context is no better than none, so there is no gap. P512: not measured.
    assert gap_recovered(none, full, system) == {"P16": 0.75, "P32": -0.25, "P128": None, "P512": None}


def test_an_interval_resamples_documents_not_windows() -> None:
    # Two documents, all windows of one alike: every resample has mean 0, 1/2 or 1.
    values, documents = np.array([0.0] * 50 + [1.0] * 50), ["a"] * 50 + ["b"] * 50
    assert bootstrap_interval(values, documents, 0) == [0.0, 1.0]
    by_window = bootstrap_interval(values, [str(n) for n in range(100)], 0)
    assert by_window is not None
    assert 0.39 < by_window[0] < 0.45
    assert 0.55 < by_window[1] < 0.61


def test_an_interval_needs_two_documents() -> None:
    assert bootstrap_interval(np.ones(5), ["a"] * 5, 0) is None


def test_an_interval_of_a_ratio_resamples_both_sums_together() -> None:
    # Half of each document's gap is recovered, whatever its size; or all of one document's and nothing of the other's.
    gap, documents = np.array([1.0, 1.0, 8.0, 8.0]), ["a", "a", "b", "b"]
    assert bootstrap_interval(gap / 2, documents, 0, over=gap) == [0.5, 0.5]
    recovered = np.array([0.0, 0.0, 8.0, 8.0])
    assert bootstrap_interval(recovered, documents, 0, over=gap) == [0.0, 1.0]


def test_documents_count_by_their_windows() -> None:
    # The mean of all values, not of the documents' means.
    values = np.array([1.0, 1.0, 1.0, 1.0])
    assert bootstrap_interval(values, ["a", "a", "a", "b"], 0) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The  Cat's hat.", "cats hat"), ("an Apple, a day", "apple day"), ("Theatre", "theatre"), ("...", "")],
)
def test_answers_are_compared_as_squad_does(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


def test_exact_match_takes_any_reference() -> None:
    assert exact_match("the Valletta.", ["Mdina", "Valletta"]) == 1
    assert exact_match("Valletta city", ["Mdina", "Valletta"]) == 0
    assert exact_match("x", []) == 0


@pytest.mark.parametrize("nothing", ["a", "The", "!", "", "an ..."])
def test_a_reference_of_which_normalization_leaves_nothing_matches_no_answer(nothing: str) -> None:
    for answer in ("", "the", nothing):
        assert (exact_match(answer, [nothing]), f1(answer, [nothing]), rouge_l(answer, [nothing[:0]])) == (0, 0, 0)
    assert judgeable([nothing, "Muscat"]) == ["Muscat"]
    assert exact_match("Muscat!", [nothing, "Muscat"]) == f1("the Muscat", [nothing, "Muscat"]) == 1


def test_words_of_any_script_are_words() -> None:
    assert rouge_l("Маскат", ["Доха"]) == rouge_l("多哈", ["马斯喀特"]) == 0
    assert rouge_l("Столица - Маскат", ["столица Маскат"]) == 1
    assert f1("多哈", ["马斯喀特"]) == 0


def test_f1_is_the_best_word_overlap() -> None:
    # Two of three words found, two of two wanted: precision 2/3, recall 1.
    assert f1("red green blue", ["red green", "yellow"]) == pytest.approx(0.8)
    # A word counts as often as it stands in both.
    assert f1("go go go", ["go go stop"]) == pytest.approx(2 / 3)
    assert f1("red", ["blue"]) == 0
    assert f1("", [""]) == 0
    assert f1("the", ["blue"]) == 0


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # police, the, gunman of 4 and 4 words; the worked example of the ROUGE paper's kind.
    assert rouge_l("the gunman police killed", ["police killed the gunman"]) == pytest.approx(0.5)
    assert rouge_l("Police kill the gunman.", ["police killed the gunman"]) == pytest.approx(0.75)
    assert rouge_l("a b", ["x", "a b c d"]) == pytest.approx(2 / 3)
    assert rouge_l("", ["a"]) == 0.0


@pytest.mark.parametrize(
    "answer", ["The passages do not say.", "I don’t have that information.", "It is not mentioned in the text."]
)
def test_refusals_are_known_by_their_words(answer: str) -> None:
    assert is_refusal(answer)
    assert not is_refusal("Paris, which does not sleep") and not is_refusal("42")
