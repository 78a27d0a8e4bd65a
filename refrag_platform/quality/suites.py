"""What is expected of each artifact: one suite per stage, as data; importing it costs nothing.

`SUITES[stage]` is read by `checks.check_artifact`, which hands each expectation to Great Expectations,
and by the Dagster assets, which declare one asset check per expectation. A suite looks at summary rows
(one per file, shard, split, system ...), never at token arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One expectation over one column (or pair) of one summary table.

    `says` is a rule, which stands beside any outcome: what must be, not what is. `expectation` is the name of a class
    in great_expectations.expectations, `arguments` its arguments.
    An integrity check always blocks; a quality threshold blocks a `released` recipe and warns for an
    `undertrained` one.
    """

    name: str
    table: str
    says: str
    expectation: str
    arguments: dict[str, Any] = field(default_factory=dict)
    integrity: bool = True

    @property
    def columns(self) -> list[str]:
        """The columns of the table that are looked at."""
        return [self.arguments[key] for key in ("column", "column_A", "column_B") if key in self.arguments]

    @property
    def allowed(self) -> str:
        """What may stand in the column, in words."""
        if "column_B" in self.arguments:
            relation = "equal to"
            if "Greater" in self.expectation:
                relation = "at least" if self.arguments.get("or_equal") else "above"
            return f"{relation} {self.arguments['column_B']}"
        low, high = self.arguments.get("min_value"), self.arguments.get("max_value")
        if low == high:
            return f"{low}"
        return " and ".join(
            f"{word} {value}" for word, value in (("at least", low), ("at most", high)) if value is not None
        )


def none_of(name: str, table: str, column: str, says: str) -> Check:
    """Every row counts zero faults."""
    return within(name, table, column, says, 0, 0)


def within(
    name: str,
    table: str,
    column: str,
    says: str,
    low: float | None = None,
    high: float | None = None,
    integrity: bool = True,
) -> Check:
    """Every row's value lies between two bounds, both allowed."""
    bounds = {key: value for key, value in (("min_value", low), ("max_value", high)) if value is not None}
    return Check(name, table, says, "ExpectColumnValuesToBeBetween", {"column": column, **bounds}, integrity)


def same(name: str, table: str, column: str, other: str, says: str) -> Check:
    """Two columns agree in every row."""
    return Check(name, table, says, "ExpectColumnPairValuesToBeEqual", {"column_A": column, "column_B": other})


def above(name: str, table: str, column: str, other: str, says: str, or_equal: bool = False) -> Check:
    """One column is greater than another in every row, or no less: a threshold of quality."""
    arguments = {"column_A": column, "column_B": other, "or_equal": or_equal}
    return Check(name, table, says, "ExpectColumnPairValuesAToBeGreaterThanB", arguments, integrity=False)


FILES = none_of("files_complete", "files", "missing", "Every file of the format must be there and not be empty")

CORPUS = (
    FILES,
    none_of("token_id_range", "shards", "outside_vocabulary", "Token ids must lie in the tokenizer's vocabulary"),
    same("shard_lengths", "shards", "tokens", "tokens_due", "A shard must hold its documents' tokens"),
    none_of("document_places", "splits", "misplaced", "Documents must lie back to back, as the index says"),
    within("splits_filled", "splits", "documents", "Every split must have documents", low=1),
    none_of("documents_filled", "splits", "empty", "No document may be empty"),
    none_of("duplicates", "splits", "duplicates", "No text or id may occur twice in a split"),
    none_of("split_leakage", "splits", "leaked", "No text or id of a split may occur in another split"),
    same("counts", "splits", "tokens", "tokens_stated", "Each split must have the tokens that corpus.json states"),
    none_of("passages_placed", "splits", "passages_astray", "A passage must have its document's split"),
    none_of("questions_placed", "splits", "questions_astray", "A question must have its document's split"),
    none_of(
        "questions_gold", "splits", "gold_wrong", "A question must have answers, and gold that names listed passages"
    ),
)

CHUNKS = (
    FILES,
    same("one_vector_per_chunk", "shards", "vectors", "chunks", "There must be one vector per chunk"),
    none_of("vectors_finite", "shards", "nonfinite", "Chunk vectors must be finite"),
    within("vector_norms", "shards", "norm_min", "No chunk vector may be (nearly) zero", low=1e-3),
    within("vectors_not_collapsed", "shards", "spread", "Chunk vectors must differ from one another", low=0.01),
    none_of("token_id_range", "shards", "outside_vocabulary", "Token ids must be padding or in the vocabulary"),
    none_of("padding", "shards", "padding_wrong", "Padding may stand only at a chunk's end"),
    same("chunk_count", "store", "chunks", "chunks_of_passages", "There must be as many chunks as passages count"),
    none_of("chunk_spans", "store", "spans_wrong", "Passages' chunks must follow one another without gaps"),
    same("counts", "store", "passages", "passages_stated", "There must be as many passages as store.json states"),
    none_of("duplicates", "store", "duplicates", "No passage id may occur twice"),
    same(
        "encoder_digest",
        "store",
        "encoder_digest",
        "encoder_digest_of_model",
        "The encoder must be the fine-tuned model's",
    ),
    same("chunk_size", "store", "chunk_size", "chunk_size_of_recipe", "k must be the recipe's"),
    none_of("retrieval_vectors", "store", "retrieval_faults", "Retrieval vectors must be finite and not zero"),
)

WEIGHTS = (
    FILES,
    none_of("weights_finite", "weights", "nonfinite", "Weights must be finite"),
    within("weights_filled", "weights", "parameters", "Every weight file must hold numbers", low=1),
)

LOSS = (
    none_of("loss_finite", "training", "loss_faults", "The training's losses must be finite numbers"),
    none_of("steps_taken", "training", "steps_missing", "The training must have taken all of its steps"),
)

CHECKPOINT = (
    *WEIGHTS,
    same("parameter_counts", "parameters", "found", "stated", "There must be as many parameters as stated"),
    *LOSS,
    above("loss_falls", "training", "before", "after", "Training must lower the loss"),
    none_of("vectors_finite", "vectors", "nonfinite", "Chunk vectors of the corpus must be finite"),
    within("vectors_not_collapsed", "vectors", "spread", "Chunk vectors must differ from one another", low=0.01),
    same("encoder_digest", "vectors", "encoder_digest", "encoder_digest_stated", "The encoder must be the one named"),
)

POLICY = (
    *WEIGHTS,
    *LOSS,
    none_of("scores_finite", "scores", "nonfinite", "Scores of chunk vectors must be finite"),
    within("scores_differ", "scores", "spread", "Scores must differ between chunks", low=1e-6, integrity=False),
    same("budget_kept", "scores", "kept", "budget", "As many chunks must be kept as the budget allows"),
    same("vectors_fit", "budget", "vector_dim", "vector_dim_of_encoder", "It must read vectors of the encoder's size"),
    same(
        "encoder_digest",
        "budget",
        "encoder_digest",
        "encoder_digest_of_model",
        "It must have learnt on vectors of the fine-tuned model's encoder",
    ),
    same("budget_of_recipe", "budget", "share_kept", "share_of_recipe", "The budget must be the recipe's"),
)

EVALUATION = (
    FILES,
    none_of("perplexity_complete", "perplexity_systems", "missing", "Every system must have its perplexity row"),
    none_of("perplexity_finite", "perplexity", "nonfinite", "Log-perplexities must be finite and positive"),
    none_of("rag_complete", "rag_systems", "missing", "Every system must have its RAG rows"),
    within("rag_scores", "rag", "exact_match", "Exact match must be a share, 0 to 1", 0, 1),
    within("rag_f1", "rag", "f1", "F1 must be a share, 0 to 1", 0, 1),
    within("decoder_tokens", "rag", "decoder_tokens", "Every system must have read tokens", low=1),
    above("refrag_beats_none", "gain", "none", "refrag", "A context's vectors must lower the decoder's log-perplexity"),
    above(
        "refrag_beats_shuffled", "gain", "shuffled", "refrag", "A context's own vectors must lower it further than "
        "another document's",
    ),
    above("answers_beat_none", "rag_gain", "refrag", "none", "F1 must be higher with passages than without"),
    within(
        "retrieval_complete", "retrieval", "missing", "Held-out questions must be looked up in the chunk store, and "
        "answered by every system over what was found", 0, 0, integrity=False,
    ),
    above(
        "hit_rates_rise", "hit_rates", "hit_rate", "at_fewer", "The hit rate among more passages must not be lower",
        or_equal=True,
    ),
    above(
        "hit_rate_floor", "hit_rate_floor", "hit_rate", "least_hit_rate", "The chunk store's search must find the gold "
        "passage of as many questions as evaluation.least_hit_rate asks for", or_equal=True,
    ),
)  # fmt: skip

PACKAGE = (FILES, none_of("inputs_packed", "holds", "differs", "What is packed must be what the pipeline made"))

SUITES: dict[str, tuple[Check, ...]] = {
    "corpus": CORPUS,
    "reconstruction": CHECKPOINT,
    "cpt": CHECKPOINT,
    "chunks": CHUNKS,
    "policy": POLICY,
    "finetuned": CHECKPOINT,
    "evaluation": EVALUATION,
    "package": PACKAGE,
}
