"""`refrag evaluate`: log-perplexity and question answering of a model, on any documents and questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refrag_platform.cli.options import Controls, Json, Model, RecipeFile, Report, Seed, known_controls, known_recipe
from refrag_platform.cli.rag import rag
from refrag_platform.cli.retrieval import retrieval
from refrag_platform.cli.selection import selection
from refrag_platform.files import write_json
from refrag_platform.names import name_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from refrag_platform.model.loading import Bundle

commands = typer.Typer(
    name="evaluate", no_args_is_help=True, help="Log-perplexity and question answering against controls."
)


@commands.command()
def perplexity(
    model: Model,
    documents: Annotated[Path, typer.Option(help=".txt, .md, .jsonl or .parquet file, .zst of these, or a folder.")],
    context: Annotated[int, typer.Option(min=1, help="s: context tokens, a multiple of the model's k.")],
    output: Annotated[int, typer.Option(min=16, help="o: tokens predicted after the context.")],
    json: Json,
    windows: Annotated[int, typer.Option(min=1, help="Windows over all documents, at most.")] = 64,
    share_kept: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            help="p: share of chunks that the policy keeps as tokens; give it again for more rows. Default 0.",
        ),
    ] = None,
    controls: Controls = None,
    recipe: RecipeFile = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at once.")] = 8,
    seed: Seed = 0,
    report: Report = None,
) -> None:
    """Log-perplexity of the first 16, 32, 128 and 512 tokens after a compressed context.

    Systems: full context, no context, the last s/k tokens; REFRAG with its own chunks, with another
    document's, and with zero vectors. Use documents that the model was never trained on. Untuned rows are
    of the recipe's decoder before training, or of the model's own where no recipe is known. The gap
    recovered between no and full context is given against tuned controls only.
    """
    from refrag_platform.evaluation.perplexity import evaluate_perplexity
    from refrag_platform.evaluation.report import perplexity_report
    from refrag_platform.evaluation.scoring import PLAIN_SYSTEMS
    from refrag_platform.evaluation.stage import write_reports
    from refrag_platform.evaluation.windows import document_windows
    from refrag_platform.model.loading import load_bundle

    bundle = load_bundle(model)
    cut = document_windows(documents, bundle.model, context, output, windows, seed)
    untuned, source = _untuned(model, bundle, recipe)
    result: dict[str, Any] = {
        **evaluate_perplexity(
            bundle.model,
            bundle.policy,
            cut,
            untuned=untuned,
            controls=known_controls(controls, model, bundle, "cpt", PLAIN_SYSTEMS),
            shares=share_kept or [0.0],
            batch_size=batch_size,
            seed=seed,
        ),
        "model": model,
        "documents": name_text(documents),
        "untuned_decoder": source,
        "context_tokens": context,
        "output_tokens": output,
        "seed": seed,
    }
    write_json(json, result)
    if report:
        write_reports(report, f"Log-perplexity of {model}", perplexity=result)
    typer.echo(perplexity_report(result))


for _command in (rag, selection, retrieval):
    commands.command()(_command)


def _untuned(model: str, bundle: Bundle, recipe_file: Path | None) -> tuple[PreTrainedModel, str]:
    """The recipe's decoder before training, and its source; the model's own where the recipe is not known."""
    from refrag_platform.evaluation.decoders import untuned_decoder

    known = known_recipe(model, bundle, recipe_file)
    if known is None:
        return bundle.model.decoder, "the model's own, for want of its recipe"
    recipe, base = known
    return untuned_decoder(recipe, base, like=bundle.model), recipe.decoder.source
