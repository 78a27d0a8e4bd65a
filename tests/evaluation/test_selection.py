"""The policy's choice of chunks beside others: all keep as many, and are judged by the same tokens."""

import json
from pathlib import Path

import pytest
import torch

from refrag_platform.corpus.question_files import read_questions
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.metrics import PREFIXES
from refrag_platform.evaluation.scoring import score_refrag
from refrag_platform.evaluation.selection import evaluate_selection, judged_questions, judged_windows
from refrag_platform.evaluation.selection_report import selection_report
from refrag_platform.evaluation.windows import Windows
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.prompts import passage_chunks
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import unchunk
from refrag_platform.project import Project
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.store.retriever import HashedWords
from refrag_platform.training.evidence import HAS_ANSWER, IN_GOLD, evidence_levels
from tests.command import refrag, refused

SYSTEMS = ["policy", "random", "low_perplexity", "high_perplexity", "similarity"]


class Longest(PolicyNetwork):
    """Stands for a policy: scores by the size of a chunk's vector."""

    def forward(self, vectors: torch.Tensor, *given: object, **named: object) -> torch.Tensor:
        return vectors.float().norm(dim=-1)


@pytest.fixture
def other(model: RefragModel) -> PolicyNetwork:
    return Longest(model.vector_dim, 32, 2, 2, 0.25)


def test_windows_are_judged_by_prefixes_and_the_policy_s_row_is_that_of_the_perplexity_evaluation(
    model: RefragModel, policy: PolicyNetwork, windows: Windows
) -> None:
    judged = judged_windows(model, windows)
    found = evaluate_selection(model, {"policy": policy}, judged, shares=[0.125, 0.25], draws=2, batch_size=3)
    rows = {(row["system"], row["share_kept"]): row for row in found["rows"]}
    assert list(rows) == [(system, share) for share in (0.125, 0.25) for system in [*SYSTEMS, "last"]]
    expected = score_refrag(model, policy, windows, 0.25, batch_size=7)
    assert rows["policy", 0.25]["P16"] == pytest.approx(expected[:, :16].mean(), abs=1e-4)
    assert [name for name in PREFIXES if name in rows["policy", 0.25]] == ["P16", "P32"]
    gains = {(row["over"], row["share_kept"]): row["P32"] for row in found["differences"]}
    gain = gains["last", 0.125]
    assert gain[0] == pytest.approx(rows["last", 0.125]["P32"] - rows["policy", 0.125]["P32"], abs=1e-4)
    assert gain[1] <= gain[0] <= gain[2]
    again = evaluate_selection(model, {"policy": policy}, judged, shares=[0.125, 0.25], draws=2, batch_size=7)
    for one, two in zip(found["rows"], again["rows"], strict=True):
        assert one == pytest.approx(two, abs=2e-5)


def test_the_oracle_of_one_chunk_is_no_worse_than_any_choice(
    model: RefragModel, policy: PolicyNetwork, other: PolicyNetwork, windows: Windows
) -> None:
    judged = judged_windows(model, Windows(windows.tokens[:, :64], windows.documents, 32))
    found = evaluate_selection(
        model, {"policy": policy, "longest": other}, judged, shares=[0.125], oracle=len(windows), draws=8
    )
    rows = {row["system"]: row for row in found["rows"]}
    assert rows["oracle"]["windows"] == len(windows)
    assert all(rows["oracle"]["P32"] <= row["P32"] + 1e-5 for row in found["rows"])
    pairs = {(row["system"], row["over"]) for row in found["differences"]}
    assert {("policy", "longest"), ("longest", "policy"), ("longest", "oracle")} <= pairs
    few = evaluate_selection(model, {"policy": policy}, judged, shares=[0.125], oracle=2)
    assert next(row for row in few["rows"] if row["system"] == "oracle")["windows"] == 2


def test_questions_are_judged_by_their_answers(
    model: RefragModel, policy: PolicyNetwork, evaluation_project: Project
) -> None:
    asked = read_questions(evaluation_project.content("corpus", "tiny") / "questions" / "test.jsonl")
    judged = judged_questions(model, asked, passages=3, distractors=[("", "Nothing of that kind.")])
    assert len(judged.episodes) == len(asked)
    found = evaluate_selection(
        model, {"policy": policy}, judged, shares=[0.25], answered=True, max_new_tokens=3, batch_size=4
    )
    assert [row["system"] for row in found["rows"]] == SYSTEMS
    assert all(set(row) >= {"answer_log_perplexity", "answer_kept", "exact_match", "f1"} for row in found["rows"])
    assert {row["questions"] for row in found["rows"]} == {len(asked)}
    assert all(row["answer_log_perplexity"][1] is not None for row in found["differences"])
    assert found["references_skipped"] == 0
    judged.references[0] = ("The",)  # type: ignore[index]
    found = evaluate_selection(model, {"policy": policy}, judged, shares=[0.25], answered=True, max_new_tokens=3)
    assert found["references_skipped"] == 1 and "Skipped for exact match and F1: 1 references" in selection_report(
        found
    )
    with pytest.raises(RefragError, match="nothing to choose"):
        judged_questions(model, [asked[0].__class__("1", "?", (), ())], passages=2)


def test_what_the_retriever_finds_nearest_is_a_choice_beside_a_policy_that_is_told_it(
    model: RefragModel, evaluation_project: Project
) -> None:
    asked = read_questions(evaluation_project.content("corpus", "tiny") / "questions" / "test.jsonl")[:3]
    policy = PolicyNetwork(model.vector_dim, 32, 1, 2, 0.25, "question", relevance=True).eval()
    for told in (None, PassageRelevance(HashedWords())):
        judged = judged_questions(model, asked, 3, relevance=told)
        found = evaluate_selection(model, {"policy": policy}, judged, shares=[0.25], batch_size=2)
        rows = {row["system"]: row for row in found["rows"]}
        assert ("relevance" in rows) == (told is not None)
    # A fresh policy starts from just that, beside how alike single chunks are.
    assert rows["relevance"]["answer_log_perplexity"] is not None


def test_the_answer_s_chunks_are_those_of_its_mention_in_a_gold_passage(model: RefragModel) -> None:
    passages = [
        ("A", "The capital is Porto-Novo."),
        ("B", "Much is said before. The capital is Porto-Novo, on a lagoon."),
    ]
    cut = [passage_chunks(model.tokenizer, title, text, 4) for title, text in passages]
    first = len(cut[0].token_ids)
    levels = evidence_levels(model.tokenizer, passages, cut, {passages[1]}, ["Porto-Novo"])
    assert len(levels) == sum(len(chunks.token_ids) for chunks in cut) and not levels[:first].any()
    held = torch.cat([chunks.token_ids for chunks in cut])[levels == HAS_ANSWER]
    text = str(model.tokenizer.decode(unchunk(held)))
    assert "Porto-Novo" in text and len(held) < len(cut[1].token_ids) - 1
    assert evidence_levels(model.tokenizer, passages, cut, set(), ["porto-novo"])[:first].any()
    assert evidence_levels(model.tokenizer, passages, cut, {passages[1]}, ["Cotonou"]).max() == IN_GOLD


def test_the_command_writes_json_tables_and_a_picture(evaluation_project: Project, tmp_path: Path) -> None:
    folder = str(evaluation_project.content("finetuned", "tiny"))
    questions = str(evaluation_project.content("corpus", "tiny") / "questions" / "test.jsonl")
    common = ["evaluate", "selection", "--model", folder, "--json", str(tmp_path / "out.json")]
    options = ["--questions", questions, "--shares", "0.2", "--windows", "4", "--passages", "2"]
    refrag(*common, *options, "--report", tmp_path / "report")
    result = json.loads((tmp_path / "out.json").read_text())
    assert {row["share_kept"] for row in result["rows"]} == {0.2} and result["passages"] == 2
    assert (tmp_path / "report" / "selection.png").stat().st_size > 1000
    assert "policy over random" in (tmp_path / "report" / "report.md").read_text()
    for wrong in (
        [],
        ["--questions", questions, "--documents", questions],
        ["--questions", questions, "--shares", "0"],
    ):
        assert "give" in refused(*common, *wrong)
