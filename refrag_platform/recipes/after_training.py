"""What is done with a trained model: it is evaluated, released and served."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from refrag_platform.recipes.base import Section, Share

GateMetric = Literal[
    "P16", "P32", "P128", "P512", "exact_match", "f1",
    "retrieval_hit_1", "retrieval_hit_5", "retrieval_hit_10", "retrieval_hit_20",
    "retrieval_answered", "retrieval_exact_match", "retrieval_f1",
]  # fmt: skip
Tolerance = Annotated[float, Field(ge=0)]


class EvaluationRecipe(Section):
    """The fixed held-out evaluation that ends every run."""

    context_tokens: int = Field(1024, ge=8)
    output_tokens: int = Field(512, ge=16)
    windows: int = Field(64, ge=1, description="perplexity windows")
    questions: int = Field(200, ge=1, description="held-out questions")
    question_file: str | None = Field(
        None,
        description="file, relative to the recipe's folder, of questions with the passages that a retriever found, "
        "best first (`refrag questions rank`); asked in place of the corpus' own, which list the gold passage among "
        "distractors",
    )
    passages: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [1, 4, 8], min_length=1, description="numbers of passages in the RAG rows"
    )
    max_new_tokens: int = Field(24, ge=1, description="longest answer")
    batch_size: int = Field(8, ge=1)
    least_hit_rate: Share = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the held-out questions in the chunk store whose gold passage must be among the first 20 "
        "that its search finds; below, the evaluation's check warns, or blocks a released recipe",
    )


class ReleaseRecipe(Section):
    """What a model must show on the held-out sets before it replaces the released one."""

    tolerances: dict[GateMetric, Tolerance] = Field(
        default={
            "P32": 0.01,
            "P128": 0.01,
            "exact_match": 0.02,
            "f1": 0.02,
            "retrieval_hit_1": 0.02,
            "retrieval_hit_5": 0.02,
            "retrieval_answered": 0.02,
            "retrieval_exact_match": 0.02,
            "retrieval_f1": 0.02,
        },
        min_length=1,
        description="figures of refrag that decide, and by how much each may get worse: P16 to P512 in nats, the "
        "others as shares of 1; no other figure counts, and all of these must be there. exact_match and f1 are over "
        "the passages that questions list, retrieval_exact_match and retrieval_f1 over those that the store's search "
        "finds; retrieval_hit_1, _5, _10 and _20 are its hit rates, retrieval_answered what least_similarity lets pass",
    )
    confidence: Share = Field(
        0.95,
        gt=0,
        lt=1,
        description="of the paired bootstrap's interval, all of which must lie within the tolerance",
    )


class ServingRecipe(Section):
    """What the packaged service does when a request does not say."""

    passages: int = Field(8, ge=1, description="passages retrieved for a question")
    least_similarity: float | None = Field(
        0.66,
        ge=-1,
        le=1,
        description="cosine similarity, by the store's retriever, that the nearest retrieved passage must have to the "
        "question, or the answer is that the documents do not say; null: answer in any case. Each retriever has a "
        "scale of its own: 0.66 was measured with MiniLM (`refrag evaluate retrieval`)",
    )
    max_new_tokens: int = Field(128, ge=1)
    max_prompt_positions: int = Field(4096, ge=64, description="longest prompt, in decoder positions")
    max_positions: int = Field(
        8192, ge=64, description="longest prompt and answer together; the decoder's window where that is shorter"
    )
    slots: int = Field(8, ge=1, description="answers written at once; each holds max_positions of the KV cache")
    prefill_positions: int = Field(
        512, ge=16, description="positions of new prompts read between two tokens of running answers"
    )
    prefix_cache_mb: int = Field(
        256, ge=0, description="memory for keys and values of prompts' beginnings, for prompts that begin alike"
    )
