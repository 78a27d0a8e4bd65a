"""A released version on the held-out set of a later one: new documents change it, so that old figures don't pair."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from refrag_platform.corpus.held_out import held_out_questions, looked_up_questions
from refrag_platform.errors import ArtifactError
from refrag_platform.evaluation.items import Items
from refrag_platform.evaluation.perplexity import window_items
from refrag_platform.evaluation.rag import evaluate_rag
from refrag_platform.evaluation.scoring import score_refrag
from refrag_platform.evaluation.served import evaluate_served
from refrag_platform.evaluation.windows import split_windows
from refrag_platform.model.loading import load_bundle
from refrag_platform.recipes import Recipe
from refrag_platform.store.relevance import recipe_relevance
from refrag_platform.weights import tokenizer_digest

# What it takes of the released version.
MEASURED = ("finetuned", "chunks", "policy")


def measure(released: Mapping[str, Path], candidate: Path, corpus: Path, recipe: Recipe, base: Path) -> Items:
    """REFRAG's figures of a released version, on the windows and questions that `recipe` takes from `corpus`.

    Args:
        released: content folders of its artifacts MEASURED; questions are looked up in its own store, by the settings
            that `recipe` has for serving.
        candidate: the model folder whose tokenizer made the corpus. base: the recipe's folder.

    Raises:
        ArtifactError: the model can't read that set: its tokenizer is another, or k does not divide the context.
    """
    bundle = load_bundle(str(released["finetuned"]), policy=released["policy"])
    settings = recipe.evaluation
    wanted = PreTrainedTokenizerFast.from_pretrained(candidate / "tokenizer")
    if tokenizer_digest(bundle.model.tokenizer) != tokenizer_digest(wanted):
        raise ArtifactError(
            f"the released model of {recipe.name} has another tokenizer than the candidate, so their log-perplexities "
            "can't be compared; release the candidate with --force-reason"
        )
    if settings.context_tokens % bundle.model.chunk_size:
        raise ArtifactError(
            f"evaluation.context_tokens of {recipe.name} is {settings.context_tokens}, which is no multiple of the "
            f"released model's k, {bundle.model.chunk_size}; the two can't be compared on it"
        )
    windows = split_windows(
        corpus, "test", settings.context_tokens, settings.output_tokens, settings.windows, recipe.seed
    )
    nll = score_refrag(bundle.model, bundle.policy, windows, 0.0, settings.batch_size, seed=recipe.seed)
    relevance = recipe_relevance(recipe, base, bundle.model.device)
    asked = held_out_questions(settings, corpus, base)
    answers = evaluate_rag(
        bundle.model,
        bundle.policy,
        asked,
        passages=[max(settings.passages)],
        share_kept=bundle.share_kept,
        systems=["refrag"],
        max_new_tokens=settings.max_new_tokens,
        relevance=relevance,
        seed=recipe.seed,
    )
    questions = looked_up_questions(asked, settings, corpus)
    served = evaluate_served(bundle, questions, released["chunks"], recipe, base, relevance)
    return Items(windows=window_items(nll, windows), questions=answers.items, retrieval=served.items)
