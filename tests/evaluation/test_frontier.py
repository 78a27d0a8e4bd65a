"""`refrag bench frontier`: what was judged is timed, prompt for prompt, and both stand in one row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refrag_platform.bench import stores
from refrag_platform.bench.clock import Ceilings
from refrag_platform.bench.frontier import joined
from refrag_platform.bench.judged import TIMED, read_judged
from refrag_platform.bench.report import UNRECORDED, frontier_report
from refrag_platform.corpus.question import Passage
from refrag_platform.corpus.question_files import read_questions
from refrag_platform.errors import RefragError
from refrag_platform.project import Project
from refrag_platform.store.retriever import HashedWords
from tests.command import refrag, refused

SYSTEMS = "none,full,first,plain,sentences,kept,refrag"
FILES = ("coast.jsonl", "inland.jsonl")
PARTS = ("retrieval_ms", "choice_ms", "projection_ms", "prefill_ms")


@pytest.fixture(scope="module")
def folder(evaluation_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of questions, and what `refrag evaluate rag` says of both together."""
    folder = tmp_path_factory.mktemp("frontier")
    test = evaluation_project.content("corpus", "tiny") / "questions" / "test.jsonl"
    lines = test.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, own in zip(FILES, (lines[:2], lines[3:6]), strict=True):
        (folder / name).write_text("".join(own), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(evaluation_project.root)
        refrag(
            "evaluate", "rag", "--model", "tiny", *asked(folder), "--passages", "3", "--share-kept", "0",
            "--shares", "0.25", "--systems", SYSTEMS, "--max-new-tokens", "2", "--batch-size", "4",
            "--json", str(folder / "judged.json"),
        )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, evaluation_project: Project) -> None:
    monkeypatch.chdir(evaluation_project.root)
    # Given, not measured: that takes longer than all else here.
    monkeypatch.setattr(Ceilings, "measure", lambda *_: Ceilings(1e11, 1e10))


def asked(folder: Path) -> list[str]:
    return [part for name in FILES for part in ("--questions", str(folder / name))]


def timed(folder: Path, name: str, *more: str) -> dict[str, Any]:
    refrag(
        "bench", "frontier", "--model", "tiny", *asked(folder), "--rows", str(folder / "judged.json"),
        "--stores", str(folder / "stores"), "--json", str(folder / name), *more,
    )  # fmt: skip
    result: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return result


def test_every_judged_configuration_is_timed_on_the_prompts_that_were_judged(folder: Path) -> None:
    result = timed(folder, "store.json", "--plot", str(folder / "store.svg"))
    judged = json.loads((folder / "judged.json").read_text(encoding="utf-8"))
    wanted = {(row["system"], row["share_kept"], row["tokens_of"]): row for row in judged["rows"]}
    found = {(row["system"], row["share_kept"], row["tokens_of"]): row for row in result["rows"]}
    assert list(found) == [key for system in TIMED for key in wanted if key[0] == system]
    for key, row in found.items():
        assert row["timed_tokens"] == pytest.approx(wanted[key]["decoder_tokens"], abs=0.01)
        assert row["f1"] == pytest.approx(wanted[key]["f1"], abs=1e-4) and row["questions"] == 5
        assert {name: own["questions"] for name, own in row["sets"].items()} == dict(zip(FILES, (2, 3), strict=True))
        for name in ("ttft_ms", *PARTS):
            low, high = row["spread"][name]
            assert 0 < low <= row[name] <= high
    (machine,) = result["machines"]
    assert machine["retrieval"] == stores.CHUNK_STORE and machine["timed"] == dict(zip(FILES, (2, 3), strict=True))
    assert "</svg>" in (folder / "store.svg").read_text(encoding="utf-8")


def test_machines_stand_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one is bare: it has no lancedb."""
    here = timed(folder, "here.json", "--limit", "2", "--runs", "2")
    monkeypatch.setattr(stores, "find_spec", lambda _: None)
    bare = timed(folder, "bare.json", "--limit", "1")
    assert bare["machines"][0]["retrieval"].startswith("exact search in memory: question embedded on cpu")
    files = [folder / "here.json", folder / "bare.json"]
    with pytest.raises(RefragError, match="both time k = 4 on CPU"):
        joined(files)
    for row in (*bare["rows"], *bare["machines"]):
        row["device"] = "another"
    (folder / "bare.json").write_text(json.dumps(bare), encoding="utf-8")
    both = ("--json", str(folder / "both.json"), "--plot", str(folder / "both.png"))
    printed = [line for line in refrag("bench", "frontier-join", *files, *both).output.splitlines() if line[:1] == "|"]
    device = here["machines"][0]["device"]
    assert f"{device}: first token, ms" in printed[0] and "another: first token, ms" in printed[0]
    assert len(printed) == 2 + len(here["rows"]) and not any("–" in line for line in printed)
    assert (folder / "both.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "both.json").read_text())["rows"] == here["rows"] + bare["rows"]


def test_a_store_in_memory_holds_what_a_chunk_store_holds(
    evaluation_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = evaluation_project.content("corpus", "tiny") / "questions" / "test.jsonl"
    passages: list[Passage] = list(dict.fromkeys(p for question in read_questions(test) for p in question.passages))
    recipe, base = evaluation_project.recipe("tiny"), evaluation_project.recipe_path("tiny").parent
    model = evaluation_project.content("finetuned", "tiny")
    opened = []
    for spec in (stores.find_spec, lambda _: None):
        monkeypatch.setattr(stores, "find_spec", spec)
        opened.append(stores.open_store(tmp_path, model, HashedWords(), recipe, base, passages)[0])
    for passage in passages:
        real, exact = (store.passage(stores.passage_id(passage)) for store in opened)
        assert np.array_equal(real.token_ids, exact.token_ids) and np.array_equal(real.vectors, exact.vectors)
        assert [store.search(passage[1], 3)[0].id for store in opened] == [real.id] * 2


def changed(folder: Path, name: str, **values: Any) -> Path:
    result = json.loads((folder / "judged.json").read_text(encoding="utf-8")) | values
    (folder / name).write_text(json.dumps(result), encoding="utf-8")
    return folder / name


def test_what_other_weights_or_questions_gave_is_not_timed(folder: Path) -> None:
    digests = json.loads((folder / "judged.json").read_text(encoding="utf-8"))["digests"]
    for part in ("decoder", "encoder", "projection", "policy", "retriever"):
        assert digests[part], part
        other = changed(folder, "other.json", digests={**digests, part: "0" * 32})
        frontier = ("bench", "frontier", "--model", "tiny", *asked(folder), "--json", folder / "none.json", "--rows")
        assert f"another {part}: 000000000000 and {digests[part][:12]}" in refused(*frontier, other)
    files = dict.fromkeys(digests["questions"], "1" * 64)
    other = changed(folder, "other.json", digests={**digests, "questions": files})
    assert "another file of questions, coast.jsonl: 111111111111 and" in refused(*frontier, other)
    older = json.loads((folder / "judged.json").read_text(encoding="utf-8"))
    del older["digests"]
    (folder / "older.json").write_text(json.dumps(older), encoding="utf-8")
    assert "doesn't tell which weights it judges; run it again" in refused(*frontier, folder / "older.json")
    assert not (folder / "none.json").exists()


def test_machines_that_timed_other_weights_are_not_put_together(folder: Path) -> None:
    one = timed(folder, "one.json", "--limit", "1")
    other = json.loads(json.dumps(one))
    for row in (*other["rows"], *other["machines"]):
        row["device"] = "another"
    files = [folder / "one.json", folder / "two.json"]

    def join() -> str:
        files[1].write_text(json.dumps(other), encoding="utf-8")
        return frontier_report(joined(files))

    assert UNRECORDED not in join()
    other["machines"][0]["digests"]["policy"] = None
    with pytest.raises(
        RefragError, match=r"one.json and .*two.json time models of k = 4 that differ in policy: .* none"
    ):
        join()
    del other["machines"][0]["digests"]
    assert UNRECORDED in join()


def test_what_was_judged_otherwise_is_refused(folder: Path) -> None:
    whole = json.loads((folder / "judged.json").read_text(encoding="utf-8"))
    parts = {Path(name).name: part for name, part in whole["parts"].items()}
    half = changed(folder, "half.json", parts={FILES[0]: parts[FILES[0]]})
    # By whether training has shown a question, which is no file of questions.
    seen = changed(folder, "seen.json", parts=whole["parts"] | {"seen in training": parts[FILES[0]]})
    assert read_judged([seen], FILES) == read_judged([folder / "judged.json"], FILES)
    assert whole["seen"]["questions"] == 5
    worse = json.loads(json.dumps(parts))
    worse[FILES[1]]["rows"][1]["f1"] += 0.5
    for files, message in (
        ([half], "full, 3 passages was not judged on inland.jsonl"),
        ([folder / "judged.json", changed(folder, "worse.json", parts=worse)], "has other figures in another file"),
        ([changed(folder, "shuffled.json", order="shuffled")], "in the order shuffled"),
        ([changed(folder, "coarse.json", rate=2)], "at rate 2; what is timed is .*--rate 1"),
        ([changed(folder, "other.json", parts={"hills.jsonl": parts[FILES[0]]})], "judges hills.jsonl, which"),
        ([folder / "nothing.json"], "no file .*nothing.json; make it by `refrag evaluate rag"),
    ):
        with pytest.raises(RefragError, match=message):
            read_judged(files, FILES)
