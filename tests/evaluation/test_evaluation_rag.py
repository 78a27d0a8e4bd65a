"""Answers to questions: what each system reads, and how answers are scored."""

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refrag_platform.corpus.question import Passage, Question
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.answering import generate_batch
from refrag_platform.evaluation.pruning import pruned, self_information
from refrag_platform.evaluation.rag import evaluate_rag
from refrag_platform.evaluation.readings import Readers, prompts
from refrag_platform.evaluation.report import rag_report
from refrag_platform.evaluation.systems import STAGE_SYSTEMS, Reading, System
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.prompts import passage_chunks, passage_text, rag_prompt
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Text, prompt_length, unchunk
from refrag_platform.model.selection import expand
from refrag_platform.project import Project
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.store.retriever import HashedWords
from tests.command import refrag, refused
from tests.evaluation.conftest import judged

ROW_KEYS = ["system", "passages", "share_kept", "exact_match", "f1", "decoder_tokens", "ttft_ms"]


def compressed(
    model: RefragModel, policy: PolicyNetwork | None, passages: Sequence[Passage], share: float, chance: torch.Generator
) -> list[Chunks]:
    cut = [passage_chunks(model.tokenizer, title, text, model.chunk_size) for title, text in passages]
    return expand(model, cut, share, policy, chance)


def test_every_system_has_its_rows(model: RefragModel, policy: PolicyNetwork, questions: list[Question]) -> None:
    result = judged(
        model, policy, questions[:4], passages=[1, 3], share_kept=policy.share_kept, max_new_tokens=3,
        systems=STAGE_SYSTEMS, relevance=PassageRelevance(HashedWords()),
    )  # fmt: skip
    assert [list(row)[: len(ROW_KEYS)] for row in result.rows] == [ROW_KEYS] * len(result.rows)
    assert {(row["system"], row["passages"], row["share_kept"]) for row in result.rows} == {
        ("none", 0, None),
        *(("full", count, None) for count in (1, 3)),
        *((system, count, None) for system in ("first", "plain", "sentences") for count in (1, 3)),
        *(("refrag", count, 0.25) for count in (1, 3)),
        *(("refrag_wrong", count, 0.25) for count in (1, 3)),
    }
    rows = {(row["system"], row["passages"]): row for row in result.rows}
    assert all(row["ttft_ms"] > 0 and 0 <= row["f1"] <= 1 for row in result.rows)
    assert rows["none", 0]["decoder_tokens"] < rows["refrag", 3]["decoder_tokens"] < rows["full", 3]["decoder_tokens"]
    # The plain decoder gets as many tokens of the passages as REFRAG takes positions.
    for system in ("plain", "sentences"):
        assert rows[system, 3]["decoder_tokens"] == rows["refrag", 3]["decoder_tokens"]
    assert len(result.answers) == 4 * (1 + 6 * 2)


def test_refrag_with_every_chunk_kept_answers_as_the_full_context_does(
    model: RefragModel, questions: list[Question]
) -> None:
    result = judged(model, None, questions[::3], passages=[2], share_kept=1.0, max_new_tokens=8)
    answers = {(answer["id"], answer["system"]): answer["answer"] for answer in result.answers}
    rows = {row["system"]: row for row in result.rows}
    assert rows["refrag"]["decoder_tokens"] == rows["full"]["decoder_tokens"]
    for question in questions[::3]:
        assert answers[question.id, "refrag"] == answers[question.id, "full"]


def test_answers_are_scored_against_the_references(model: RefragModel, questions: list[Question]) -> None:
    found = judged(model, None, questions[:2], max_new_tokens=4)
    said = {(answer["id"], answer["system"]): answer["answer"] for answer in found.answers}
    # Asked again with what REFRAG said as the reference, REFRAG is right.
    told = [Question(q.id, q.question, (said[q.id, "refrag"],), q.passages, q.gold, q.document) for q in questions[:2]]
    again = judged(model, None, told, max_new_tokens=4)
    row = next(row for row in again.rows if row["system"] == "refrag")
    assert (row["exact_match"], row["f1"]) == (1.0, 1.0)


def test_what_training_has_shown_is_counted_and_has_figures_of_its_own(
    model: RefragModel, questions: list[Question]
) -> None:
    empty, seen = replace(questions[1], answers=("The",)), [True, True, False, False]
    asked = [questions[0], empty, *questions[2:4]]
    found = judged(model, None, asked, seen=seen)
    assert found.skipped["questions_seen"] == 1
    counts = {name: part["questions_used"] for name, part in found.parts.items()}
    assert counts == {"seen in training": 1, "not seen in training": 2}
    alone = judged(model, None, asked[2:], systems=["refrag"])
    rows = found.parts["not seen in training"]["rows"]
    assert next(row for row in rows if row["system"] == "refrag")["f1"] == alone.rows[0]["f1"]
    told = {
        "questions": 3,
        "same_question": 0,
        "run_of_words": 1,
        "half_a_passage": 1,
        "seen": 1,
        "missing": ["a.jsonl"],
    }
    report = rag_report({"rows": found.rows, "seen": told})
    assert "Seen in training: 1 of 3 questions" in report and "read here: a.jsonl." in report
    assert "isn't known here" in rag_report({"rows": found.rows, "seen": None})


def test_questions_whose_references_say_nothing_are_skipped_and_counted(
    model: RefragModel, questions: list[Question]
) -> None:
    empty = replace(questions[1], answers=("The", "!"))
    asked = [replace(questions[0], answers=("a", *questions[0].answers)), empty, questions[2]]
    found = judged(model, None, asked, sets=["x", "x", "y"])
    assert found.skipped == {"questions_used": 2, "questions_skipped": 1, "references_skipped": 3}
    assert {answer["id"] for answer in found.answers} == {questions[0].id, questions[2].id}
    assert {name: part["questions_used"] for name, part in found.parts.items()} == {"x": 1, "y": 1}
    assert len(found.items.groups) == 2
    said = "Skipped: 3 references of which normalization leaves nothing, and 1 questions that have no other."
    assert said in rag_report({"rows": found.rows, **found.skipped})
    assert "Skipped" not in rag_report({"rows": found.rows, "references_skipped": 0, "questions_skipped": 0})
    with pytest.raises(RefragError, match="none of 1 questions can be judged"):
        judged(model, None, [empty])


def test_a_budget_is_kept_over_all_passages_together(
    model: RefragModel, policy: PolicyNetwork, questions: list[Question]
) -> None:
    passages = questions[0].take(4)
    chunks = compressed(model, policy, passages, 0.25, torch.Generator())
    total = sum(len(part.token_ids) for part in chunks)
    assert sum(int(part.keep.sum()) for part in chunks) == round(0.25 * total)
    with torch.inference_mode():
        wanted = model.encode(torch.cat([part.token_ids for part in chunks]))
    torch.testing.assert_close(torch.cat([part.vectors for part in chunks if part.vectors is not None]), wanted)
    for part, (title, text) in zip(chunks, passages, strict=True):
        assert model.tokenizer.decode(unchunk(part.token_ids)) == passage_text(title, text)


def test_questions_are_judged_at_a_coarser_rate_by_a_model_that_was_trained_for_it(
    evaluation_project: Project, tmp_path: Path
) -> None:
    model = RefragModel.load(evaluation_project.content("finetuned", "tiny"))
    model.rates = (1, 2)
    (tmp_path / "model").mkdir()
    model.save(tmp_path / "model")
    asked = str(evaluation_project.content("corpus", "tiny") / "questions" / "test.jsonl")
    rag = ["evaluate", "rag", "--model", str(tmp_path / "model"), "--questions", asked, "--limit", "2"]
    rag += ["--passages", "2", "--share-kept", "0", "--systems", "none,full,plain,refrag,kept+zero,kept+other"]
    rag += ["--max-new-tokens", "2", "--json", str(tmp_path / "rag.json"), "--rate"]
    lengths = {}
    for rate in (1, 2):
        refrag(*rag, rate)
        result = json.loads((tmp_path / "rag.json").read_text())
        lengths[rate] = {row["system"]: row["decoder_tokens"] for row in result["rows"]}
        assert result["k"] == rate * model.chunk_size
        assert {lengths[rate][name] for name in ("plain", "kept+zero", "kept+other")} == {lengths[rate]["refrag"]}
    assert lengths[1]["full"] == lengths[2]["full"]
    chunks = lengths[1]["refrag"] - lengths[1]["none"]
    # Each question's two passages end in a chunk of their own.
    assert chunks / 2 <= lengths[2]["refrag"] - lengths[2]["none"] <= chunks / 2 + 1
    assert "this model is trained for 1, 2" in refused(*rag, "4")


def test_chance_picks_chunks_where_there_is_no_policy(model: RefragModel, questions: list[Question]) -> None:
    passages = questions[0].take(4)

    def kept(seed: int) -> list[bool]:
        parts = compressed(model, None, passages, 0.5, torch.Generator().manual_seed(seed))
        return torch.cat([part.keep for part in parts]).tolist()

    assert kept(1) == kept(1) != kept(2)


def test_a_lone_question_has_no_wrong_passages(model: RefragModel, questions: list[Question]) -> None:
    result = judged(model, None, questions[:1])
    row = next(row for row in result.rows if row["system"] == "refrag_wrong")
    assert row["f1"] is row["ttft_ms"] is None


def test_a_question_that_is_left_out_moves_no_figure_to_another_set(
    model: RefragModel, questions: list[Question]
) -> None:
    """The first has no stranger whose passages could be its wrong ones; the others read the first one's."""
    bare = [replace(question, passages=(), gold=()) for question in questions[1:3]]
    found = judged(model, None, [replace(questions[0], gold=()), *bare], systems=["refrag_wrong"], sets=["a", "b", "b"])
    assert found.rows[0]["f1"] is not None and found.intervals[0]["f1"] is None
    assert found.parts["a"]["rows"][0]["f1"] is None
    assert found.parts["b"]["rows"][0]["f1"] == found.rows[0]["f1"]


def test_plain_systems_run_on_tuned_controls_where_given(
    model: RefragModel, questions: list[Question], tmp_path: Path
) -> None:
    silent = copy.deepcopy(model)
    with torch.no_grad():  # a control that ends its answer at once
        silent.decoder.get_output_embeddings().weight.zero_()
        silent.decoder.get_output_embeddings().weight[silent.tokenizer.eos_token_id] = 1
        silent.decoder.model.norm.weight.fill_(1)
        for layer in silent.decoder.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        silent.decoder.model.embed_tokens.weight.fill_(1)
    (tmp_path / "full").mkdir()
    silent.save(tmp_path / "full")
    result = judged(model, None, questions[:1], max_new_tokens=4, controls={"full": tmp_path / "full"})
    said = {answer["system"]: answer["answer"] for answer in result.answers}
    assert said["full"] == ""
    assert said["refrag"] != ""


def test_prompts_are_those_of_fine_tuning(model: RefragModel, questions: list[Question]) -> None:
    result = judged(model, None, questions[:2], passages=[2], max_new_tokens=1)
    row = next(row for row in result.rows if row["system"] == "refrag")
    lengths = [
        prompt_length(
            rag_prompt(model.tokenizer, q.question, compressed(model, None, q.take(2), 0.0, torch.Generator()))
        )
        for q in questions[:2]
    ]
    assert row["decoder_tokens"] == sum(lengths) / 2


def test_plain_and_pruned_read_as_many_tokens_as_refrag_at_each_share(
    model: RefragModel, policy: PolicyNetwork, questions: list[Question]
) -> None:
    systems: list[System] = ["full", "plain", "pruned", "refrag"]
    found = judged(model, policy, questions[:3], passages=[3], shares=[0.25], systems=systems, batch_size=4)
    tokens = {
        (row["system"], row["tokens_of"] if row["share_kept"] is None else row["share_kept"]): row["decoder_tokens"]
        for row in found.rows
    }
    assert tokens["refrag", 0.25] > tokens["refrag", 0.0]
    for share in (0.0, 0.25):
        assert tokens["plain", share] == tokens["pruned", share] == tokens["refrag", share]
    compression = {row["system"]: row["compression"] for row in found.rows}
    assert compression["full"] == 1.0 < compression["refrag"]
    full = next(row["decoder_tokens"] for row in found.rows if row["system"] == "full")
    for row in found.rows:
        assert row["compression"] == pytest.approx(full / row["decoder_tokens"], abs=1e-4)
    assert {(row["over"], row["share_kept"]) for row in found.differences} == {
        (system, share) for system in ("full", "plain", "pruned") for share in (0.0, 0.25)
    }


def test_pruning_keeps_what_the_decoder_finds_most_surprising(model: RefragModel) -> None:
    passages = [[5, 6, 7, 8, 9], [10, 11]]
    nats = self_information(model, passages)
    ids = torch.tensor([[model.start_token_id, *passages[1]]])
    with torch.inference_mode():
        logits = model.decoder(input_ids=ids).logits[0, :-1].log_softmax(-1)
    wanted = -logits.gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(nats[1], wanted)
    least = int(torch.cat(nats).argmin())
    assert pruned(model, passages, 6) == [token for place, token in enumerate(range(5, 12)) if place != least]
    assert pruned(model, passages, 99) == list(range(5, 12))


def test_answers_in_batches_are_those_of_one_prompt_at_a_time(
    model: RefragModel, policy: PolicyNetwork, questions: list[Question]
) -> None:
    def said(batch_size: int) -> tuple[list[dict[str, object]], list[float | None]]:
        found = judged(
            model, policy, questions[:5], passages=[1, 2], share_kept=0.25, max_new_tokens=6, batch_size=batch_size
        )
        return found.answers, [row["ttft_ms"] for row in found.rows]

    alone, timed = said(1)
    together, untimed = said(4)
    assert together == alone
    assert None not in timed and set(untimed) == {None}


def test_an_answer_ends_at_a_stop_id_in_a_batch_too(model: RefragModel) -> None:
    prompts = [[Text([5, 6, 7])], [Text([8, 9, 10, 11, 12])]]
    free = generate_batch(model, prompts, 5, stops=[])
    stop = free[0][2]
    cut = generate_batch(model, prompts, 5, stops=[stop])
    assert cut[0] == free[0][: free[0].index(stop)]
    assert cut[1] == (free[1][: free[1].index(stop)] if stop in free[1] else free[1])


def test_the_untuned_decoder_is_asked_in_its_own_template(model: RefragModel, questions: list[Question]) -> None:
    untuned = copy.deepcopy(model.decoder)
    found = judged(model, None, questions[:2], systems=["untuned"], untuned=untuned)
    (row,) = found.rows
    assert (row["system"], row["tuned"], row["decoder"]) == ("untuned", False, "untuned")
    with pytest.raises(RefragError, match="untuned"):
        evaluate_rag(model, None, questions[:2], passages=[1], share_kept=0.0, systems=["untuned"])


def test_refusals_are_judged_where_some_question_has_no_answer(model: RefragModel, questions: list[Question]) -> None:
    asked = [replace(questions[0], answerable=False), replace(questions[1], answerable=True), questions[2]]
    found = judged(model, None, asked, systems=["refrag"])
    assert found.rows[0]["refusal_accuracy"] == pytest.approx(2 / 3, abs=1e-4)
    found = judged(model, None, questions[:2], systems=["refrag"])
    assert found.rows[0]["refusal_accuracy"] is None


def test_a_policy_is_told_how_near_the_question_s_passages_are(model: RefragModel, questions: list[Question]) -> None:
    policy = PolicyNetwork(model.vector_dim, 32, 1, 2, 0.25, "question", relevance=True).eval()
    nearest = Question("q", "Where is coffee grown?", ("x",), (("", "Zinc melts."), ("", "Coffee is grown here.")))
    kept = {}
    for told in (None, PassageRelevance(HashedWords())):
        readers = Readers(model, policy, {}, relevance=told)
        (made,) = prompts(readers, nearest, None, [Reading("refrag", 2, 0.3)], torch.Generator())
        kept[told is not None] = [int(part.keep.sum()) for part in made[1] if isinstance(part, Chunks)]
    assert kept[True][0] == 0 < kept[True][1] == sum(kept[False]) and kept[False][0] > 0
    wrong = judged(
        model,
        policy,
        questions[:2],
        passages=[2],
        share_kept=0.25,
        systems=["refrag", "refrag_wrong"],
        relevance=PassageRelevance(HashedWords()),
    )
    assert len(wrong.rows) == 2


def test_the_recipe_names_the_retriever_of_relevance_and_without_it_there_is_none(
    evaluation_project: Project, tmp_path: Path
) -> None:
    folder = shutil.copytree(evaluation_project.content("finetuned", "tiny"), tmp_path / "model")
    dim = RefragModel.load(folder).vector_dim
    PolicyNetwork(dim, 32, 1, 2, 0.25, "question", relevance=True).save(folder)
    asked = str(evaluation_project.content("corpus", "tiny") / "questions" / "test.jsonl")
    rag = ["evaluate", "rag", "--model", str(folder), "--questions", asked, "--limit", "2", "--passages", "2"]
    rag += ["--systems", "refrag", "--max-new-tokens", "2", "--json", str(tmp_path / "rag.json")]
    assert "name it by --recipe" in refused(*rag)
    recipe = str(evaluation_project.recipe_path("tiny"))
    for options, told in ((["--recipe", recipe], True), (["--no-relevance"], False)):
        refrag(*rag, *options)
        assert json.loads((tmp_path / "rag.json").read_text())["relevance"] == told
