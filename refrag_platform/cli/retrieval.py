"""`refrag evaluate retrieval`: whether the right passage is found, and questions without one are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from refrag_platform.cli.options import find_project
from refrag_platform.files import write_json


def retrieval(
    model: Annotated[str, typer.Option("--model", "-m", help="A model of `refrag recipes ls`; its store is searched.")],
    questions: Annotated[
        list[Path] | None,
        typer.Option(
            help="A question file instead of the corpus' own questions; again for more. `gold` names passages with "
            "the store's own title and text, `history` earlier turns, `answerable: false` what it holds nothing about."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions of each kind, at most.")] = 200,
    json: Annotated[Path | None, typer.Option(help="Also write the result here.")] = None,
    seed: Annotated[int, typer.Option(help="Of the questions drawn.")] = 0,
) -> None:
    """How often search finds the right passage, alone and in conversations, and what is refused.

    Search is that of the service, no model reads the passages. Without --questions the Factbook's countries are asked
    about, those in the corpus and those that are not. Use it to choose the recipe's serving.least_similarity.
    """
    from refrag_platform.corpus.question_files import read_questions
    from refrag_platform.evaluation.report import lookup_table
    from refrag_platform.evaluation.retrieval import cuts_of, factbook_cases, file_cases, look_up, retrieval_report
    from refrag_platform.store.table import ChunkStore

    project = find_project()
    recipe = project.recipe(model)
    base = project.recipe_path(model).parent
    content = project.content("chunks", model)
    store = ChunkStore.open(content, base=base)
    if questions:
        cases = [case for path in questions for case in file_cases(read_questions(path, limit), content, path.stem)]
    else:
        cases = factbook_cases(project.content("corpus", model), limit, seed)
    looked = [one for one, _ in look_up(store, cases, recipe.serving.passages)]
    report = retrieval_report(looked, recipe.serving.least_similarity, cuts_of(store))
    if json:
        asked = {"model": model, "questions": [str(path) for path in questions or []], "limit": limit, "seed": seed}
        write_json(json, asked | report)
    typer.echo(lookup_table(report))
    least, best = report["least_similarity"], report["best"]
    typer.echo("in percent; alone: by the last message; together: with what was asked before, as served")
    typer.echo(f"answered: serving.least_similarity is {'null, so all are' if least is None else least}")
    if best is not None:
        typer.echo(f"suggested serving.least_similarity: {best}, chosen on half of the subjects")
        typer.echo("other half: what that answers of the questions about the others")
