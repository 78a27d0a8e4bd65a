"""What a trained model writes, for the UI: held-out text out of its chunk vectors, answers to held-out questions.

Made by the process that made the artifact, where the device is; samples.json lies beside the content.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from assets.metadata import Metadata, Published, curve
from refrag_platform.files import write_json
from refrag_platform.project import Project

if TYPE_CHECKING:
    from refrag_platform.model.refrag import RefragModel
    from refrag_platform.model.segments import Prompt

FILE_NAME = "samples.json"
SAMPLES, CHUNKS, ANSWER_TOKENS = 6, 4, 32
REBUILT, ANSWERED = frozenset({"reconstruction", "cpt"}), frozenset({"finetuned"})


def samples(published: Published) -> Metadata:
    """The samples as a table in Markdown; nothing where none were made."""
    path = published.folder / FILE_NAME
    if not path.is_file():
        return {}
    rows: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| " + " | ".join(map(_cell, row.values())) + " |" for row in rows]
    header = f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}\n"
    return {"samples": dg.MetadataValue.md(header + "\n".join(lines))}


def training(published: Published) -> Metadata:
    """What the UI shows of a training: the course of its loss, and what the model writes."""
    return {**curve(published), **samples(published)}


def write_samples(project: Project, stage: str, model: str) -> None:
    """Let the model in place write samples, once.

    Raises:
        RefragError: the artifact is not in place, or the held-out split has no text that is long enough.
    """
    if stage not in REBUILT | ANSWERED:
        return
    target = project.stage_dir(stage, model) / FILE_NAME
    if target.is_file():
        return
    from refrag_platform.model.loading import default_device, default_dtype
    from refrag_platform.model.refrag import RefragModel

    device = default_device()
    trained = RefragModel.load(project.content(stage, model), default_dtype(device), device)
    corpus = project.content("corpus", model)
    rows = _rebuilt(trained, corpus, stage == "cpt") if stage in REBUILT else _answered(trained, corpus)
    write_json(target, rows, ensure_ascii=False)


def _rebuilt(model: RefragModel, corpus: Path, after_cpt: bool) -> list[dict[str, str]]:
    """Text in chunks, and what the decoder writes from their vectors alone.

    The token that starts a text stands before them; behind them as well after cpt, to which it says "repeat" there.
    """
    from refrag_platform.model.segments import Chunks, Text
    from refrag_platform.training.core.windows import WindowSampler

    length = CHUNKS * model.chunk_size
    rows = []
    for tokens in WindowSampler(corpus, "validation", length, seed=0).batch(0, 0, SAMPLES):
        prompt: list[Text | Chunks] = [Text([model.start_token_id]), Chunks(tokens.view(CHUNKS, -1))]
        if after_cpt:
            prompt.append(Text([model.start_token_id]))
        text = str(model.tokenizer.decode(tokens))
        rows.append({f"text of {CHUNKS} chunks": text, "written from their vectors": _written(model, prompt, length)})
    return rows


def _answered(model: RefragModel, corpus: Path) -> list[dict[str, str]]:
    """Held-out questions over passages as vectors alone: no policy is trained yet that would keep chunks."""
    from refrag_platform.corpus.question_files import read_questions
    from refrag_platform.model.prompts import passage_chunks, rag_prompt

    rows = []
    for question in read_questions(corpus / "questions" / "validation.jsonl", SAMPLES):
        cut = [passage_chunks(model.tokenizer, title, text, model.chunk_size) for title, text in question.passages]
        answer = _written(model, rag_prompt(model.tokenizer, question.question, cut), ANSWER_TOKENS)
        rows.append({"question": question.question, "expected": " or ".join(question.answers), "answer": answer})
    return rows


def _written(model: RefragModel, prompt: Prompt, tokens: int) -> str:
    from refrag_platform.model.generate import generate
    from refrag_platform.model.prompts import stop_ids

    ids = list(generate(model, prompt, tokens, stop_ids(model.tokenizer)))
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))


def _cell(text: str) -> str:
    """Text as one cell: what a model writes must not end the table, nor be taken for Markdown or HTML."""
    shown = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{sign}" if sign in "\\`*_[]|#~" else sign for sign in shown)
