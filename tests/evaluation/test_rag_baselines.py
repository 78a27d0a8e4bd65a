"""The baselines of a table of questions: as many tokens, one order, what replaces vectors, and who read a row."""

import copy
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from refrag_platform.cli import app
from refrag_platform.corpus.question import Passage, Question
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.decoders import control_folders
from refrag_platform.evaluation.figures import COLORS
from refrag_platform.evaluation.rag import evaluate_rag
from refrag_platform.evaluation.readings import Readers, prompts
from refrag_platform.evaluation.scoring import PLAIN_SYSTEMS
from refrag_platform.evaluation.systems import (
    CONTROL_KINDS,
    EXPLAINED,
    SYSTEMS,
    VECTOR_SYSTEMS,
    Order,
    Reading,
    System,
    decoder_of,
    readings,
)
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Prompt, lay_out, plain_tokens, prompt_length
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.store.retriever import HashedWords
from tests.conftest import ROOT
from tests.evaluation.conftest import judged

CUT: tuple[System, ...] = ("truncated", "plain", "sentences", "pruned", "kept+zero", "kept+other")
SHARES = (0.0, 0.25, 0.5)
FAR, NEAR, NEXT = ("Zinc", "Zinc melts early."), ("Coffee", "Coffee is grown in Yemen."), ("Tea", "Tea is grown too.")
ASKED = Question("q", "Where is coffee grown?", ("Yemen",), (FAR, NEXT, NEAR))
OTHER = Question("o", "Which army was first?", ("x",), (("Army", "The army came first. It was large."),))


def made(readers: Readers, asked: Question, wrong: Question | None, wanted: list[Reading]) -> dict[Reading, Prompt]:
    found = prompts(readers, asked, wrong, wanted, torch.Generator().manual_seed(0))
    return {reading: prompt for reading, prompt, _ in found}


def readers_of(model: RefragModel, policy: PolicyNetwork | None, order: Order = "nearest") -> Readers:
    return Readers(model, policy, {}, model, PassageRelevance(HashedWords()), order=order)


def test_what_is_cut_has_as_many_positions_as_refrag(
    model: RefragModel, policy: PolicyNetwork, questions: list[Question]
) -> None:
    readers = readers_of(model, policy)
    for number in (0, 4):
        # The next question of the file may be about the same document.
        found = made(readers, questions[number], questions[(number + 3) % 9], readings(SYSTEMS, [3], SHARES))
        length = {reading: prompt_length(prompt) for reading, prompt in found.items()}
        for share in SHARES:
            refrag = length[Reading("refrag", 3, share)]
            assert {length[Reading(system, 3, share)] for system in CUT} == {refrag}
            # A chunk more would have been too much.
            assert refrag - model.chunk_size < length[Reading("rule", 3, share)] <= refrag
            vectors = sum(
                int((~part.keep).sum()) for part in found[Reading("refrag", 3, share)] if isinstance(part, Chunks)
            )
            assert length[Reading("kept", 3, share)] == refrag - vectors
        assert length[Reading("none", 0)] < length[Reading("first", 3)] < length[Reading("full", 3)]


def texts(model: RefragModel, prompt: Prompt) -> list[Passage]:
    """The passages in the order in which a prompt has them."""
    said = model.tokenizer.decode(plain_tokens(prompt))
    found = [(said.index(text), (title, text)) for title, text in ASKED.passages if text in said]
    return [passage for _, passage in sorted(found)]


def test_all_systems_read_passages_in_one_order(model: RefragModel, policy: PolicyNetwork) -> None:
    whole: list[System] = ["full", "untuned", "kept+zero", "kept+other", "rule", "refrag"]
    wanted = [
        *readings(whole, [3], [0.25]),
        Reading("first", 3),
        Reading("plain", 3, 1.0),
        Reading("sentences", 3, 1.0),
    ]
    orders: tuple[tuple[Order, tuple[Passage, ...]], ...] = (
        ("nearest", (NEAR, NEXT, FAR)),
        ("listed", (FAR, NEXT, NEAR)),
    )
    for order, expected in orders:
        for reading, prompt in made(readers_of(model, policy, order), ASKED, OTHER, wanted).items():
            assert texts(model, prompt) == list(expected[:1] if reading.system == "first" else expected), reading
    shuffled = [
        {tuple(texts(model, prompt)) for prompt in made(readers, ASKED, OTHER, readings(whole, [3], [0.25])).values()}
        for readers in (Readers(model, policy, {}, model, order="shuffled", seed=seed) for seed in (0, 0, 1, 2, 3))
    ]
    assert all(len(orders) == 1 for orders in shuffled) and shuffled[0] == shuffled[1]
    assert len({next(iter(orders)) for orders in shuffled}) > 1


def test_the_order_is_told_and_without_a_retriever_it_is_the_listed_one(
    model: RefragModel, questions: list[Question]
) -> None:
    def evaluated(relevance: PassageRelevance | None, order: Order) -> str:
        found = judged(
            model,
            None,
            questions[:2],
            passages=[2],
            systems=["none", "refrag"],
            relevance=relevance,
            order=order,
            max_new_tokens=1,
        )
        assert [row["order"] for row in found.rows] == [None, found.order]
        return found.order

    near = PassageRelevance(HashedWords())
    assert (evaluated(near, "nearest"), evaluated(None, "nearest")) == ("nearest", "listed")
    assert (evaluated(near, "shuffled"), evaluated(near, "listed")) == ("shuffled", "listed")
    with pytest.raises(RefragError, match="`sentences` needs a retriever"):
        evaluate_rag(model, None, questions[:2], passages=[2], share_kept=0.0, systems=["sentences"])


def test_zeros_and_another_question_s_vectors_stand_where_refrag_s_stood(
    model: RefragModel, policy: PolicyNetwork
) -> None:
    readers = readers_of(model, policy)
    found = made(readers, ASKED, OTHER, readings(["kept+zero", "kept+other", "refrag"], [3], [0.25]))
    prompt = {reading.system: prompt for reading, prompt in found.items()}
    is_vector = lay_out([prompt["refrag"]], model.chunk_size).chunk_index[0] >= 0
    assert 0 < int(is_vector.sum()) < len(is_vector)
    with torch.inference_mode():
        embeds = {system: readers.of(system).embed([prompt[system]]).embeds[0] for system in prompt}
        logits = {system: readers.of(system)([prompt[system]]) for system in prompt}
        others = [part for part in made(readers, ASKED, OTHER, [Reading("refrag_wrong", 3, 0.0)]).values()]
        given = model.project(
            torch.cat([part.vectors for part in others[0] if isinstance(part, Chunks) and part.vectors is not None])
        )
    assert not embeds["kept+zero"][is_vector].any() and embeds["refrag"][is_vector].any()
    for system in ("kept+zero", "kept+other"):
        assert torch.equal(embeds[system][~is_vector], embeds["refrag"][~is_vector])
        assert logits[system].shape == logits["refrag"].shape
        assert not torch.allclose(logits[system][:, -1], logits["refrag"][:, -1])
    for vector in embeds["kept+other"][is_vector]:
        assert any(torch.allclose(vector, other, atol=1e-6) for other in given)
    # The model itself still reads vectors.
    with torch.inference_mode():
        assert torch.equal(model.embed([prompt["refrag"]]).embeds[0], embeds["refrag"])


def test_without_another_question_there_are_no_others_vectors(model: RefragModel, policy: PolicyNetwork) -> None:
    wanted = readings(["kept+other", "refrag"], [3], [0.25])
    assert [reading.system for reading in made(readers_of(model, policy), ASKED, None, wanted)] == ["refrag"]


def test_the_rule_keeps_the_first_passages_from_their_start(
    model: RefragModel, policy: PolicyNetwork, questions: list[Question]
) -> None:
    for share in (0.0, 0.25, 0.5, 1.0):
        (prompt,) = made(readers_of(model, policy), questions[0], None, [Reading("rule", 3, share)]).values()
        keep = torch.cat([part.keep for part in prompt if isinstance(part, Chunks)]).tolist()
        assert keep == sorted(keep, reverse=True)
        # REFRAG may keep the last chunk of each passage, which is short, at fewer positions.
        assert share * len(keep) - 4 < sum(keep) <= share * len(keep) + 1


@pytest.mark.parametrize(
    ("controls", "named"),
    [
        ([], {}),
        (
            ["full"],
            {"full": "tuned", **dict.fromkeys(["first", "plain", "sentences", "pruned", "kept"], "tuned for full")},
        ),
        (["none"], {"none": "tuned"}),
        (["plain"], {"plain": "tuned"}),
        (["full", "plain"], {"full": "tuned", "plain": "tuned", "kept": "tuned for full"}),
    ],
)
def test_a_row_is_tuned_only_where_a_control_was_trained_for_it(
    controls: list[System], named: dict[System, str]
) -> None:
    for system in named:
        assert decoder_of(system, controls) == named[system]
    for system in ("none", "truncated", *VECTOR_SYSTEMS):
        assert decoder_of(system, controls) == named.get(system, "own decoder")
    assert decoder_of("untuned", controls) == "untuned"


def test_every_system_is_explained_where_a_reader_looks() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for system in SYSTEMS:
        assert f"| `{system}` | {EXPLAINED[system]} |" in page
    told = CliRunner().invoke(app, ["evaluate", "rag", "--help"], env={"COLUMNS": "200"})
    assert told.exit_code == 0 and all(system in told.output for system in SYSTEMS)
    assert set(SYSTEMS) <= set(COLORS), "each has a line of its own in the picture"


def test_rows_and_differences_name_the_decoder_that_read(
    model: RefragModel, questions: list[Question], tmp_path: Path
) -> None:
    control = copy.deepcopy(model)
    for kind in ("full", "plain"):
        (tmp_path / kind).mkdir()
        control.save(tmp_path / kind)
    assert set(control_folders(tmp_path, CONTROL_KINDS)) == {"full", "plain"}
    assert set(control_folders(tmp_path, PLAIN_SYSTEMS)) == {"full"}
    found = judged(
        model,
        None,
        questions[:2],
        passages=[2],
        share_kept=0.25,
        max_new_tokens=1,
        batch_size=2,
        systems=["full", "none", "first", "plain", "rule", "refrag"],
        controls=control_folders(tmp_path, CONTROL_KINDS),
    )
    named = {row["system"]: (row["decoder"], row["tuned"]) for row in found.rows}
    assert named == {
        "full": ("tuned", True), "none": ("own decoder", False), "first": ("tuned for full", False),
        "plain": ("tuned", True), "rule": ("own decoder", True), "refrag": ("own decoder", True),
    }  # fmt: skip
    over = {row["over"]: (row["decoder"], row["tuned"], row["passages"]) for row in found.differences}
    assert over == {name: (*told, 2) for name, told in named.items() if name != "refrag"}
    for row in found.differences:
        f1 = {other["system"]: other["f1"] for other in found.rows}
        assert row["f1"][0] == pytest.approx(f1["refrag"] - f1[row["over"]], abs=1e-4)
