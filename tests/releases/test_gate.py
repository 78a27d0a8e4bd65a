"""The promotion gate: better, surely no worse than the tolerance, or refused, figure by figure."""

import json
from pathlib import Path

import numpy as np
import pytest

from refrag_platform.errors import ArtifactError
from refrag_platform.evaluation.items import FILE_NAME, Items, ItemSet
from refrag_platform.recipes import ReleaseRecipe
from refrag_platform.releases.gate import decide

RULES = ReleaseRecipe()
DOCUMENTS = [f"book {number // 8}" for number in range(64)]
QUESTIONS = [f"question {number}" for number in range(200)]
RETRIEVED = ("retrieval_hit_1", "retrieval_hit_5", "retrieval_answered")
ANSWERED = ("retrieval_exact_match", "retrieval_f1")


def items(
    nats: float = 3.0,
    noise: float = 0.0,
    right: int = 100,
    digest: str = "w",
    drop: str | None = None,
    seed: int = 1,
    retrieval: ItemSet | None = None,
) -> Items:
    """Perplexities around `nats` with noise of its own, and the first `right` questions answered."""
    own = np.random.default_rng(seed).normal(0, noise, 64) if noise else np.zeros(64)
    level = nats + np.random.default_rng(0).normal(0, 0.5, 64)
    windows = {name: level + own for name in ("P32", "P128") if name != drop}
    answered = [float(number < right) for number in range(200)]
    answers = {name: answered for name in ("exact_match", "f1") if name != drop}
    return Items(
        windows=ItemSet.of(digest, DOCUMENTS, windows),
        questions=ItemSet.of("q", QUESTIONS, answers),
        retrieval=retrieval or looked_up(),
    )


def looked_up(found: int = 150, right: int = 100, held: range = range(200), places: range = range(200)) -> ItemSet:
    """The first `found` of 200 questions found and `right` answered, as far as the store holds those `held`."""
    flags = {"retrieval_in_store": 200} | dict.fromkeys(RETRIEVED, found) | dict.fromkeys(ANSWERED, right)
    values = {name: [float(n in held and n < many) for n in places] for name, many in flags.items()}
    return ItemSet.of("r", [QUESTIONS[number] for number in places], values)


def outcomes(candidate: Items, released: Items | None, rules: ReleaseRecipe = RULES) -> dict[str, str]:
    return {verdict.metric: verdict.outcome for verdict in decide(candidate, released, rules).verdicts}


def test_a_better_candidate_is_promoted_with_its_figures() -> None:
    decision = decide(items(nats=2.8, right=120, retrieval=looked_up(170, 120)), items(), RULES)
    assert decision.promoted
    assert {verdict.outcome for verdict in decision.verdicts} == {"better"}
    found = {verdict.metric: verdict for verdict in decision.verdicts}
    assert found["P32"].gain == pytest.approx(0.2, abs=1e-4)
    assert found["exact_match"].gain == pytest.approx(0.1)
    low, high = found["f1"].low, found["f1"].high
    assert low is not None and high is not None and 0 < low < 0.1 < high
    assert found["P32"].items == 64 and found["f1"].items == 200
    assert decision.reason.startswith("promoted: P32 better (gain +0.2000 [")


def test_a_candidate_that_is_worse_on_one_figure_is_refused_however_good_the_others() -> None:
    decision = decide(items(nats=2.0, right=60), items(), RULES)
    assert not decision.promoted
    assert outcomes(items(nats=2.0, right=60), items())["P32"] == "better"
    assert decision.reason.startswith("refused: exact_match worse (gain -0.2000")
    assert "P32" not in decision.reason


def test_the_same_answers_and_a_loss_within_the_tolerance_pass() -> None:
    decision = decide(items(nats=3.005), items(), RULES)
    assert decision.promoted
    assert {verdict.outcome for verdict in decision.verdicts} == {"within tolerance"}
    assert outcomes(items(nats=3.02), items())["P32"] == "worse"


def test_a_tie_that_the_set_cannot_settle_within_the_tolerance_is_refused() -> None:
    tied = items(noise=0.2, seed=3)
    decision = decide(tied, items(), RULES)
    found = {verdict.metric: verdict for verdict in decision.verdicts}
    assert found["P32"].outcome == "tie beyond tolerance"
    assert found["P32"].low is not None and found["P32"].high is not None
    assert found["P32"].low < -0.01 and found["P32"].high > 0
    assert not decision.promoted
    wide = ReleaseRecipe(tolerances={"P32": 0.5})
    assert decide(tied, items(), wide).promoted


def test_windows_of_one_document_are_resampled_together() -> None:
    shifts = np.repeat([0.3, -0.3, 0.3, -0.3, 0.3, -0.3, 0.3, -0.3], 8)
    base = np.full(64, 3.0)
    rules = ReleaseRecipe(tolerances={"P32": 0.1})

    def of(values: np.ndarray, groups: list[str]) -> Items:
        return Items(windows=ItemSet.of("w", groups, {"P32": values}))

    alone = [str(number) for number in range(64)]
    assert outcomes(of(base + shifts, alone), of(base, alone), rules) == {"P32": "within tolerance"}
    assert outcomes(of(base + shifts, DOCUMENTS), of(base, DOCUMENTS), rules) == {"P32": "tie beyond tolerance"}
    single = ["one"] * 64
    decision = decide(of(base, single), of(base, single), rules)
    assert not decision.promoted and "single document" in decision.reason


@pytest.mark.parametrize("metric", ["P128", "f1"])
def test_a_missing_figure_refuses_on_either_side_and_for_a_first_release(metric: str) -> None:
    without = items(nats=2.0, right=200, drop=metric)
    for candidate, released, whose in (
        (without, items(), "candidate's"),
        (items(nats=2.0, right=200), items(drop=metric), "released model's"),
        (without, None, "candidate's"),
        (Items(), items(), "candidate's"),
    ):
        decision = decide(candidate, released, RULES)
        assert not decision.promoted
        assert f"{metric} is missing from the {whose} evaluation" in decision.reason


def test_other_windows_are_not_compared() -> None:
    decision = decide(items(nats=2.0, right=150, digest="other"), items(), RULES)
    assert not decision.promoted
    assert outcomes(items(nats=2.0, right=150, digest="other"), items())["f1"] == "better"
    assert "P32 was measured on another held-out set (64 items other, the released model's 64 items w)" in (
        decision.reason
    )


def test_the_first_release_needs_all_figures_and_nothing_else() -> None:
    decision = decide(items(nats=9.0, right=0), None, RULES)
    assert decision.promoted
    assert "first release" in decision.reason


def test_only_the_figures_that_the_recipe_names_count_and_decisions_are_plain_and_the_same_again() -> None:
    rules = ReleaseRecipe(tolerances={"f1": 0.0})
    decision = decide(items(nats=9.0, noise=0.4, right=101), items(), rules)
    assert [verdict.metric for verdict in decision.verdicts] == ["f1"]
    again = decide(items(nats=9.0, noise=0.4, right=101), items(), rules)
    assert json.loads(json.dumps(decision.plain())) == json.loads(json.dumps(again.plain()))


def test_damaged_items_are_named(tmp_path: Path) -> None:
    assert Items.read(tmp_path) == Items()
    values = items().model_dump()
    values["windows"]["values"]["P32"].pop()
    (tmp_path / FILE_NAME).write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=r"items.json is damaged"):
        Items.read(tmp_path)
    fewer = Items(windows=ItemSet.of("w", DOCUMENTS[:60], {"P32": [3.0] * 60}))
    with pytest.raises(ArtifactError, match="60 values of the candidate and 64 of the released"):
        decide(fewer, items(), ReleaseRecipe(tolerances={"P32": 0.1}))


def test_a_store_that_finds_less_is_refused_though_the_model_is_the_same() -> None:
    decision = decide(items(retrieval=looked_up(found=100)), items(), RULES)
    assert not decision.promoted
    assert decision.reason.startswith("refused: retrieval_hit_1 worse (gain -0.2500")
    assert all(verdict.passes for verdict in decision.verdicts if verdict.metric not in RETRIEVED)
    assert decide(items(retrieval=looked_up()), items(), RULES).promoted


def test_a_passage_that_the_store_no_longer_holds_counts_as_not_found() -> None:
    fewer = items(retrieval=looked_up(held=range(50, 200)))
    assert outcomes(fewer, items())["retrieval_hit_5"] == "worse"
    assert outcomes(fewer, items())["retrieval_f1"] == "worse"


def test_documents_that_the_released_store_lacks_are_no_merit_of_a_search() -> None:
    old = items(retrieval=looked_up(held=range(120)))
    verdicts = {one.metric: one for one in decide(items(retrieval=looked_up()), old, RULES).verdicts}
    assert verdicts["retrieval_hit_1"].outcome == "within tolerance"
    assert (verdicts["retrieval_hit_1"].items, verdicts["retrieval_hit_1"].gain) == (120, 0.0)
    assert outcomes(items(retrieval=looked_up(found=90)), old)["retrieval_hit_1"] == "worse"


def test_a_version_from_before_questions_were_looked_up_is_named_and_can_be_measured_again() -> None:
    old = items().model_copy(update={"retrieval": ItemSet()})
    decision = decide(items(), old, RULES)
    assert not decision.promoted and decision.needs_again
    assert "retrieval_hit_1 is missing from the released model's evaluation (made before questions were looked up" in (
        decision.reason
    )
    # Figures are of what the store holds: 150 of 150, not of 200.
    first = decide(items(retrieval=looked_up(held=range(150))), None, RULES).verdicts
    assert next(one.candidate for one in first if one.metric == "retrieval_hit_1") == 1.0
    # What the candidate itself lacks is not to be had by measuring the released version again.
    assert not decide(old, items(), RULES).needs_again
