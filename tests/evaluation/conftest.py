"""A tiny random model with a policy, windows of random tokens, and a project ready for the evaluation stage."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from refrag_platform.corpus.question import Question
from refrag_platform.corpus.question_files import read_questions
from refrag_platform.corpus.shards import ShardWriter, token_dtype
from refrag_platform.evaluation.rag import RagEvaluation, evaluate_rag
from refrag_platform.evaluation.systems import STAGE_SYSTEMS
from refrag_platform.evaluation.windows import Windows
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.stages import StageContext
from refrag_platform.store.build import build_chunks
from tests.conftest import copy_project

SHARE_KEPT = 0.25
WORDS = ("river", "town", "capital", "people", "trade", "island", "coast", "army", "language", "coffee", "oil")


def context(project: Project, folder: Path) -> StageContext:
    out, work = folder / "content", folder / "state"
    for path in (out, work):
        path.mkdir(parents=True)
    inputs = {name: project.content(name, "tiny") for name in ("corpus", "chunks", "policy", "finetuned")}
    recipe = project.recipe("tiny")
    short = recipe.evaluation.model_copy(update={"windows": 6, "questions": 3, "max_new_tokens": 2})
    recipe = recipe.model_copy(update={"evaluation": short})
    return StageContext(project, recipe, "evaluation", inputs, out, work, folder)


@pytest.fixture(scope="session")
def evaluation_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose `tiny` has what the evaluation stage reads, none of it trained."""
    project = copy_project(tmp_path_factory.mktemp("evaluation") / "project")
    recipe = project.recipe("tiny")
    model = RefragModel.create(recipe, project.recipe_path("tiny").parent)
    torch.manual_seed(0)
    policy = PolicyNetwork(model.vector_dim, 32, 2, 2, SHARE_KEPT, encoder_digest=model.encoder_digest())
    torch.nn.init.normal_(policy.head[1].weight)
    for part, stage in ((model, "finetuned"), (policy, "policy")):
        folder = project.content(stage, "tiny")
        folder.mkdir(parents=True)
        part.save(folder)
    _write_corpus(project.content("corpus", "tiny"), model)
    chunks = project.content("chunks", "tiny")
    (chunks.parent / "state").mkdir(parents=True)
    chunks.mkdir()
    inputs = {name: project.content(name, "tiny") for name in ("corpus", "finetuned")}
    build_chunks(StageContext(project, recipe, "chunks", inputs, chunks, chunks.parent / "state", chunks.parent))
    return project


@pytest.fixture(scope="session")
def model(evaluation_project: Project) -> RefragModel:
    return RefragModel.load(evaluation_project.content("finetuned", "tiny"))


@pytest.fixture(scope="session")
def policy(evaluation_project: Project) -> PolicyNetwork:
    return PolicyNetwork.load(evaluation_project.content("policy", "tiny"))


@pytest.fixture(scope="session")
def questions(evaluation_project: Project) -> list[Question]:
    return read_questions(evaluation_project.content("corpus", "tiny") / "questions" / "test.jsonl")


@pytest.fixture(scope="session")
def windows(model: RefragModel) -> Windows:
    """Seven windows of three documents: 32 context tokens (8 chunks of 4), 40 after it."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, len(model.tokenizer), (7, 72), generator=generator)
    return Windows(tokens, ["a", "a", "a", "b", "b", "c", "c"], 32)


def judged(
    model: RefragModel, policy: PolicyNetwork | None, questions: list[Question], **changes: Any
) -> RagEvaluation:
    """Answers of two tokens over one passage as vectors alone, by systems that need no retriever, unless `changes` says
    otherwise.
    """
    usual: dict[str, Any] = {"passages": [1], "share_kept": 0.0, "max_new_tokens": 2}
    usual["systems"] = [system for system in STAGE_SYSTEMS if system != "sentences"]
    return evaluate_rag(model, policy, questions, **usual | changes)


def sentences(seed: int, count: int) -> str:
    chance = random.Random(seed)
    return " ".join(" ".join(chance.choices(WORDS, k=8)).capitalize() + "." for _ in range(count))


def _write_corpus(content: Path, model: RefragModel) -> None:
    """Three test documents, their passages and nine questions."""
    dtype = token_dtype(len(model.tokenizer))
    content.mkdir(parents=True)
    passages, questions, tokens = [], [], 0
    with ShardWriter(content / "test", dtype, shard_tokens=256) as shards:
        for number in range(3):
            text = sentences(number, 30)
            ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            shards.add(np.array(ids))
            tokens += len(ids)
            own = [{"title": f"Land{number}", "text": sentences(10 * number + part, 2)} for part in range(4)]
            passages += [
                {"id": f"{number}/{part}", "document_id": str(number), "split": "test", **passage}
                for part, passage in enumerate(own)
            ]
            questions += [
                {
                    "id": f"{number}/{part}",
                    "question": f"What is said of Land{number}, part {part}?",
                    "answers": [own[part]["text"].split()[0]],
                    "passages": own,
                    "gold": [part],
                    "document_id": str(number),
                }
                for part in range(3)
            ]
    (content / "questions").mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in questions)
    (content / "questions" / "test.jsonl").write_text(rows, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(passages), content / "passages.parquet")
    splits = [{"id": "0", "split": "test"}, {"id": "trained", "split": "train"}]
    pq.write_table(pa.Table.from_pylist(splits), content / "documents.parquet")
    facts = {"dtype": dtype.name, "shard_tokens": 256, "tokens": {"test": tokens}}
    (content / "corpus.json").write_text(json.dumps(facts))
