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

    `expectation` is the name of a class in great_expectations.expectations, `arguments` its arguments.
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
            relation = "above" if "Greater" in self.expectation else "equal to"
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


def above(name: str, table: str, column: str, other: str, says: str, integrity: bool = True) -> Check:
    """One column is greater than another in every row."""
    arguments = {"column_A": column, "column_B": other}
    return Check(name, table, says, "ExpectColumnPairValuesAToBeGreaterThanB", arguments, integrity)


FILES = none_of("files_complete", "files", "missing", "Every file of the format is there and not empty")

CORPUS = (
    FILES,
    none_of("token_id_range", "shards", "outside_vocabulary", "Token ids lie in the tokenizer's vocabulary"),
    same("shard_lengths", "shards", "tokens", "tokens_due", "A shard holds its documents' tokens"),
    none_of("document_places", "splits", "misplaced", "Documents lie back to back, as the index says"),
    within("rows", "splits", "documents", "Every split has documents", low=1),
    none_of("lengths", "splits", "empty", "No document is empty"),
    none_of("duplicates", "splits", "duplicates", "No text or id occurs twice in a split"),
    none_of("split_leakage", "splits", "leaked", "No text or id of a split occurs in another split"),
    same("counts", "splits", "tokens", "tokens_stated", "Tokens per split are those that corpus.json states"),
    none_of("passages_placed", "splits", "passages_astray", "A passage has its document's split"),
    none_of("questions_placed", "splits", "questions_astray", "A question has its document's split"),
    none_of("questions_gold", "splits", "gold_wrong", "Gold indexes name listed passages; there are answers"),
)

CHUNKS = (
    FILES,
    same("one_vector_per_chunk", "shards", "vectors", "chunks", "There is one vector per chunk"),
    none_of("vectors_finite", "shards", "nonfinite", "Chunk vectors are finite"),
    within("vector_norms", "shards", "norm_min", "No chunk vector is (nearly) zero", low=1e-3),
    within("vectors_not_collapsed", "shards", "spread", "Chunk vectors differ from one another", low=0.01),
    none_of("token_id_range", "shards", "outside_vocabulary", "Token ids are padding or in the vocabulary"),
    none_of("padding", "shards", "padding_wrong", "Padding stands only at a chunk's end"),
    same("chunk_count", "store", "chunks", "chunks_of_passages", "Chunks are as many as passages count"),
    none_of("chunk_spans", "store", "spans_wrong", "Passages' chunks follow one another without gaps"),
    same("counts", "store", "passages", "passages_stated", "The passages are as many as store.json states"),
    none_of("duplicates", "store", "duplicates", "No passage id occurs twice"),
    same("encoder_digest", "store", "encoder_digest", "encoder_digest_cpt", "The encoder is the CPT checkpoint's"),
    same("chunk_size", "store", "chunk_size", "chunk_size_of_recipe", "k is the recipe's"),
    none_of("retrieval_vectors", "store", "retrieval_faults", "Retrieval vectors are finite and not zero"),
)

WEIGHTS = (
    FILES,
    none_of("weights_finite", "weights", "nonfinite", "Weights are finite"),
    within("weights_filled", "weights", "parameters", "Every weight file holds numbers", low=1),
)

LOSS = (
    none_of("loss_finite", "training", "loss_faults", "First and last loss are finite numbers"),
    none_of("steps_taken", "training", "steps_missing", "All steps of the recipe were taken"),
)

CHECKPOINT = (
    *WEIGHTS,
    same("parameter_counts", "parameters", "found", "stated", "There are as many parameters as stated"),
    *LOSS,
    above("loss_fell", "training", "first_loss", "last_loss", "The loss fell", integrity=False),
    none_of("vectors_finite", "vectors", "nonfinite", "Chunk vectors of the corpus are finite"),
    within("vectors_not_collapsed", "vectors", "spread", "Chunk vectors differ from one another", low=0.01),
    same("encoder_digest", "vectors", "encoder_digest", "encoder_digest_stated", "The encoder is the one named"),
)

POLICY = (
    *WEIGHTS,
    *LOSS,
    none_of("scores_finite", "scores", "nonfinite", "Scores of chunk vectors are finite"),
    within("scores_differ", "scores", "spread", "Scores differ between chunks", low=1e-6, integrity=False),
    same("budget_kept", "scores", "kept", "budget", "As many chunks are kept as the budget allows"),
    same("vectors_fit", "budget", "vector_dim", "vector_dim_of_encoder", "It reads the encoder's vectors"),
    same("budget_of_recipe", "budget", "share_kept", "share_of_recipe", "The budget is the recipe's"),
)

EVALUATION = (
    FILES,
    none_of("perplexity_complete", "perplexity_systems", "missing", "Every system has its perplexity row"),
    none_of("perplexity_finite", "perplexity", "nonfinite", "Log-perplexities are finite and positive"),
    none_of("rag_complete", "rag_systems", "missing", "Every system has its RAG rows"),
    within("rag_scores", "rag", "exact_match", "Exact match is a share", 0, 1),
    within("rag_f1", "rag", "f1", "F1 is a share", 0, 1),
    within("decoder_tokens", "rag", "decoder_tokens", "Every system read tokens", low=1),
    above("refrag_beats_none", "gain", "none", "refrag", "REFRAG is better than no context", integrity=False),
    above(
        "refrag_beats_shuffled", "gain", "shuffled", "refrag", "True chunks beat another document's", integrity=False
    ),
    above("answers_beat_none", "rag_gain", "refrag", "none", "REFRAG answers better than no context", integrity=False),
)

PACKAGE = (FILES, none_of("inputs_packed", "holds", "differs", "What was packed is what the pipeline made"))

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
