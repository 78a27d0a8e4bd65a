"""How each training stage trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from refrag_platform.recipes.base import Section, Share
from refrag_platform.recipes.reading import ReadingRecipe
from refrag_platform.recipes.sources import check_source

RANKED_SHARE = Field(
    0.0,
    ge=0,
    le=1,
    description="share of the questions whose passages stand as they are listed: best first, as a retriever serves "
    "them, in files that `refrag questions rank` wrote; a corpus' own list them in random order. Those of the others, "
    "and of questions that list nothing beside what holds the answer, stand anywhere, so that no place is trusted",
)


class TrainingRecipe(Section):
    """What every training stage shares. AdamW, linear warm-up, cosine decay (section 4)."""

    steps: int = Field(ge=1, description="optimizer steps")
    batch_size: int = Field(256, ge=1, description="sequences per optimizer step over all processes")
    micro_batch_size: int | None = Field(
        None, ge=1, description="sequences per forward pass and process; default: batch_size / processes"
    )
    warmup_share: Share = Field(0.04, ge=0, lt=1, description="share of steps with linear warm-up")
    final_learning_rate_share: Share = Field(0.1, ge=0, le=1, description="cosine ends at this share of the peak")
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16",
        description="autocast; weights stay float32; a CPU that can't multiply bf16 computes in float32",
    )
    compile: bool = Field(False, description="torch.compile the model; pays on a GPU")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    save_every: int = Field(100, ge=1, description="steps between resumable checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest complete checkpoints kept")
    accelerate_config: str | None = Field(
        None,
        description="accelerate config file to launch the stage on several processes with, relative to the recipe's "
        "folder: one of ../accelerate, say, each of which says when to use it",
    )


class TrainsEncoder(TrainingRecipe):
    """A stage that trains the encoder and the projection."""

    encoder_learning_rate: float = Field(2e-4, ge=0, description="peak, encoder")
    encoder_lora_rank: int | None = Field(
        None,
        ge=1,
        description="train low-rank updates of the encoder's layers of this rank, where they are a copy of the "
        "decoder's; default: all their weights",
    )
    projection_learning_rate: float = Field(1e-3, ge=0, description="peak, projection, pooling and heads")


class TrainsDecoder(TrainingRecipe):
    """A stage that trains the decoder."""

    decoder_learning_rate: float = Field(5e-5, ge=0, description="peak, decoder")
    lora_rank: int | None = Field(
        None, ge=1, description="train low-rank updates of the decoder's layers of this rank; default: all its weights"
    )


class CurriculumRecipe(Section):
    """Table 8: nine stages that move from 1 chunk to 2^i chunks per sample."""

    max_factor: int = Field(256, ge=1, description="most chunks in a sample; a power of two")
    stages: int = Field(9, ge=1, le=9, description="stages of table 8 that are run through")
    one_chunk_share: Share = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of every stage's steps, at least, with samples of one chunk: table 8 ends without them",
    )

    @model_validator(mode="after")
    def _power_of_two(self) -> CurriculumRecipe:
        if self.max_factor & (self.max_factor - 1) or self.max_factor > 256:
            raise ValueError(f"max_factor is {self.max_factor}; allowed are 1, 2, 4, ... 256")
        return self


class ReconstructionRecipe(TrainsEncoder, TrainsDecoder):
    """Encoder and projection learn to carry the text."""

    continue_from: str | None = Field(
        None,
        description="released version, e.g. v1.0.0, whose checkpoint is taken over as it is; `release`: the weights in "
        "models/NAME/release; null: trained here",
    )
    train_decoder: bool = Field(
        False, description="the decoder learns to read the vectors too; the paper freezes it (section 2)"
    )
    curriculum: CurriculumRecipe = CurriculumRecipe()
    helper_loss_weight: float = Field(
        1.0, ge=0, description="weight of the loss that reads token ids off the vector; decays to zero"
    )
    helper_loss_share: Share = Field(0.5, ge=0, le=1, description="share of the steps over which it decays")

    @model_validator(mode="after")
    def _decoder_trains(self) -> ReconstructionRecipe:
        if not self.train_decoder:
            self.refuse_idle("train_decoder is false", "decoder_learning_rate", "lora_rank")
        return self


class CptRecipe(TrainsEncoder, TrainsDecoder):
    """Continual pre-training: the context compressed, the next tokens predicted; all weights train."""

    continue_from: str | None = Field(
        None,
        description="released version, e.g. v1.0.0, whose checkpoint is trained on, on full contexts, with the encoder "
        "frozen; `release`: the weights in models/NAME/release, as they are; null: start from the reconstruction "
        "checkpoint",
    )
    context_tokens: int = Field(1024, ge=8, description="s; a multiple of k")
    output_tokens: int = Field(512, ge=1, description="o: predicted after the context")
    packed: bool = Field(
        False,
        description="many windows in one sequence: the o tokens after every o tokens of the context are predicted, not "
        "those after its end alone; o a multiple of k, s a multiple of o, no curriculum",
    )
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
    reading: ReadingRecipe | None = Field(
        None, description="ask about passages in most of the steps; null: every step continues or repeats text"
    )
    workers: int = Field(
        0,
        ge=0,
        description="processes beside each training one that make its batches; 0: a thread, which is enough but for "
        "reading on a GPU; they hand batches over in shared memory, some 75 MB for 96 contexts of 1,024 tokens and 12 "
        "processes",
    )

    @model_validator(mode="after")
    def _curriculum_runs(self) -> CptRecipe:
        if self.curriculum is None:
            self.refuse_idle("curriculum is null", "curriculum_share")
        if self.reading and self.curriculum:
            raise ValueError("reading asks over contexts of context_tokens from the first step; set curriculum: null")
        if self.reading and self.repeat_steps_share:
            raise ValueError("reading asks for quotes, which repeat the context; leave repeat_steps_share out")
        if self.packed and self.curriculum:
            raise ValueError("packed is true: contexts of all lengths are in every sequence; set curriculum: null")
        if self.packed and (self.context_tokens % self.output_tokens or self.context_tokens == self.output_tokens):
            raise ValueError(
                f"packed is true: context_tokens ({self.context_tokens}) must be at least twice output_tokens "
                f"({self.output_tokens}), and a multiple of it"
            )
        return self


class PolicyRecipe(TrainingRecipe):
    """GRPO with PPO clipping over Plackett-Luce picks (appendix A.1), and before it, if asked, evidence (ours)."""

    continue_from: Literal["release"] | None = Field(
        None, description="`release`: the policy in models/NAME/release, as it is; null: trained here"
    )
    learning_rate: float = Field(1e-3, ge=0, description="peak, policy network; everything else is frozen")
    share_kept: Share = Field(0.1, gt=0, lt=1, description="p: share of chunks kept as tokens, in training and serving")
    query: Literal["none", "question"] = Field(
        "none", description="what the policy sees beside the chunks: nothing, as in the paper, or the question too"
    )
    question_share: Share = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the steps whose episodes are questions over passages, the answer's log-perplexity the "
        "reward; in the others a window of text is continued",
    )
    questions: list[str] = Field(
        default_factory=list,
        description="question files (rows id, question, answers, passages, gold) beside the corpus' own",
    )
    relevance: Annotated[str, check_source("hash")] | None = Field(
        None,
        description="a retriever, that of the chunk store (`chunks.retriever`): the policy is told, too, how near it "
        "finds each passage to the question; in some of the episodes it isn't, so that it can do without",
    )
    passages: int = Field(8, ge=2, description="passages of a question's episode: the gold ones among distractors")
    min_passages: int | None = Field(
        None, ge=2, description="if set, each step's episodes have from so many up to `passages`, drawn at random"
    )
    ranked_share: Share = RANKED_SHARE
    evidence_steps: int = Field(
        0,
        ge=0,
        description="first steps, all of them questions: learn to keep the chunks in which the answer stands and those "
        "around it, without a reward; among many chunks a choice by chance hardly ever has it, and then rewards teach "
        "nothing",
    )
    evidence_weight: float = Field(0.0, ge=0, description="weight of that loss beside the reward, in the other steps")
    context_tokens: int = Field(256, ge=8, description="context of one window, a multiple of k")
    output_tokens: int = Field(64, ge=1, description="tokens of a window whose log-perplexity is the reward")
    group_size: int = Field(8, ge=2, description="G: samples per context")
    updates_per_batch: int = Field(2, ge=1, description="updates on each batch, clipped where it is rewarded")
    clip: float = Field(0.2, gt=0, lt=1, description="PPO ratio clip")
    layers: int = Field(2, ge=1, description="transformer layers of the policy network")
    hidden_size: int = Field(256, ge=8)
    heads: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _settings_agree(self) -> PolicyRecipe:
        if self.query == "question" and not self.question_share:
            raise ValueError("query is 'question' and question_share 0: the policy would never see one; raise it")
        if not self.question_share:
            self.refuse_idle(
                "question_share is 0",
                *("questions", "passages", "min_passages", "ranked_share", "evidence_steps", "evidence_weight"),
            )
        if self.relevance and self.query != "question":
            raise ValueError(
                f"relevance is {self.relevance!r}, but query is 'none': nothing is near to no question; set query"
            )
        if self.min_passages and self.min_passages > self.passages:
            raise ValueError(f"min_passages is {self.min_passages}, more than passages ({self.passages}); lower it")
        if self.evidence_steps > self.steps:
            raise ValueError(f"evidence_steps is {self.evidence_steps}, more than all steps ({self.steps}); lower it")
        if self.evidence_steps == self.steps:
            self.refuse_idle("evidence_steps takes all steps", "evidence_weight")
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size is {self.hidden_size}; it must be a multiple of heads ({self.heads})")
        return self


class FinetunedRecipe(TrainsEncoder, TrainsDecoder):
    """Instruction tuning on RAG questions, multi-turn questions and summaries."""

    tasks: dict[Literal["rag", "multi_turn", "summarization"], Annotated[float, Field(ge=0)]] = Field(
        default={"rag": 0.6, "multi_turn": 0.2, "summarization": 0.2},
        description="mixing weights",
    )
    encoder_learning_rate: float = Field(
        0.0, ge=0, description="peak, encoder; 0: it stays as cpt left it, and so do the vectors"
    )
    kept_prompts_share: Share = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the prompts in which some chunks are kept as tokens, those with the answer first or any, "
        "as the policy, which is trained later, will keep some",
    )
    most_share_kept: Share = Field(0.25, gt=0, le=1, description="of a prompt's chunks in such a prompt, at most")
    max_passages: int = Field(8, ge=1, description="passages in one prompt, at most")
    ranked_share: Share = RANKED_SHARE
    no_answer_share: Share = Field(0.1, ge=0, lt=1, description="share of questions without the gold passage")
    questions: list[str] = Field(
        default_factory=list,
        description="further question files (rows id, question, answers, passages, gold)",
    )
    summaries: list[str] = Field(default_factory=list, description="summary files (rows id, document, summaries)")
    text_share: Share = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the steps that continue windows of the corpus, as cpt does: a decoder that is only asked "
        "questions forgets how",
    )
    context_tokens: int = Field(1024, ge=8, description="context of such a window, a multiple of k")
    output_tokens: int = Field(64, ge=1, description="tokens that continue it")
    distractors: list[str] = Field(
        default_factory=list,
        description="files of further passages (rows title, text) to stand beside those that hold the answer; "
        "rows that name another `split` than train are left out",
    )

    @model_validator(mode="after")
    def _settings_agree(self) -> FinetunedRecipe:
        if not sum(self.tasks.values()):
            raise ValueError(f"tasks is {self.tasks}: no task has a weight above 0")
        if not self.encoder_learning_rate:
            self.refuse_idle("encoder_learning_rate is 0", "encoder_lora_rank")
        if not self.kept_prompts_share:
            self.refuse_idle("kept_prompts_share is 0", "most_share_kept")
        if not self.text_share:
            self.refuse_idle("text_share is 0", "context_tokens", "output_tokens")
        return self
