"""A whole recipe: its sections, and what they must agree on."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from refrag_platform.recipes.after_training import EvaluationRecipe, ReleaseRecipe, ServingRecipe
from refrag_platform.recipes.base import Section
from refrag_platform.recipes.controls import MARK, Control, ControlRecipe, TrainedSystem
from refrag_platform.recipes.data import ChunksRecipe, CorpusRecipe
from refrag_platform.recipes.parts import DecoderRecipe, EncoderRecipe, ProjectionRecipe
from refrag_platform.recipes.training import CptRecipe, FinetunedRecipe, PolicyRecipe, ReconstructionRecipe

NAME = r"^[a-z0-9][a-z0-9-]*$"


class Recipe(Section):
    """One model: what it is made of, how each stage makes it, how good it must be."""

    name: str = Field(pattern=NAME, description="lower-case letters, digits and single hyphens")
    extends: str | None = Field(
        None,
        pattern=NAME,
        description="recipe in a folder beside this one's: its settings hold where this one says nothing else",
    )
    description: str = Field(description="one sentence for `refrag recipes ls`")
    seed: int = Field(0, ge=0, description="of weights, data order and sampling")
    maturity: Literal["undertrained", "released"] = Field(
        "undertrained",
        description="quality thresholds warn for an undertrained recipe and block for a released one",
    )
    controls: dict[Control, ControlRecipe] = Field(
        default_factory=dict,
        description="plain decoders that this model is held against, by what they read; `refrag run all --model "
        "NAME--full` trains the one that reads all text, and the evaluation takes those that are trained",
    )
    system: TrainedSystem = Field(
        "refrag", description="what the decoder is trained to read; a control's own name, NAME--full, sets it"
    )
    decoder: DecoderRecipe
    encoder: EncoderRecipe
    projection: ProjectionRecipe = ProjectionRecipe()
    corpus: CorpusRecipe
    reconstruction: ReconstructionRecipe
    cpt: CptRecipe
    finetuned: FinetunedRecipe
    chunks: ChunksRecipe = ChunksRecipe()
    policy: PolicyRecipe
    evaluation: EvaluationRecipe = EvaluationRecipe()
    release: ReleaseRecipe = ReleaseRecipe()
    serving: ServingRecipe = ServingRecipe()

    @property
    def as_control(self) -> ControlRecipe | None:
        """How this recipe's control is trained, where it is one's."""
        return None if self.system == "refrag" else self.controls[self.system]

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if self.system not in ("refrag", *self.controls):
            raise ValueError(
                f"system is {self.system!r}, and controls names {', '.join(self.controls) or 'none'}; declare it there"
            )
        if self.system == "refrag" and MARK in self.name:
            raise ValueError(
                f"name is {self.name!r}, and `{MARK}` stands before a control's kind (NAME{MARK}full); call it "
                f"{re.sub('-+', '-', self.name)}, its folder too"
            )
        coarsest = self.encoder.chunk_size * self.encoder.rates[-1]
        if self.cpt.context_tokens % coarsest:
            raise ValueError(
                f"cpt.context_tokens is {self.cpt.context_tokens}; it must be a multiple of encoder.chunk_size times "
                f"the last of encoder.rates ({coarsest})"
            )
        if self.cpt.reading and self.cpt.reading.first_rate_share is not None and len(self.encoder.rates) == 1:
            raise ValueError(
                f"cpt.reading.first_rate_share is {self.cpt.reading.first_rate_share}, and encoder.rates has one "
                "rate: it would change nothing; leave it out, or give more rates"
            )
        for section in ("cpt", "policy", "evaluation"):
            tokens = getattr(self, section).context_tokens
            if tokens % self.encoder.chunk_size:
                raise ValueError(
                    f"{section}.context_tokens is {tokens}; it must be a multiple of "
                    f"encoder.chunk_size ({self.encoder.chunk_size})"
                )
        if self.cpt.packed and self.cpt.output_tokens % self.encoder.chunk_size:
            raise ValueError(
                f"cpt.packed is true: cpt.output_tokens ({self.cpt.output_tokens}) must be a multiple of "
                f"encoder.chunk_size ({self.encoder.chunk_size})"
            )
        for section in ("reconstruction", "cpt", "finetuned"):
            if (rank := getattr(self, section).encoder_lora_rank) and self.encoder.source != "decoder":
                raise ValueError(
                    f"{section}.encoder_lora_rank is {rank}, but encoder.source is {self.encoder.source!r}, of "
                    "which all weights train; leave it out, or set encoder.source: decoder"
                )
        start, cpt = self.reconstruction.continue_from, self.cpt.continue_from
        if start != cpt and (start, cpt) != ("release", None):
            raise ValueError(
                f"reconstruction.continue_from is {start!r} and cpt.continue_from {cpt!r}; both must name the same "
                "version, or none, or reconstruction alone 'release', for cpt to train on from it"
            )
        if self.policy.continue_from not in (None, self.cpt.continue_from):
            raise ValueError(
                f"policy.continue_from is {self.policy.continue_from!r}, cpt.continue_from {self.cpt.continue_from!r}: "
                "a policy reads the vectors of its own encoder, so take both from the release, or train the policy"
            )
        if self.policy.continue_from and self.finetuned.encoder_learning_rate:
            raise ValueError(
                f"policy.continue_from is {self.policy.continue_from!r}, finetuned.encoder_learning_rate "
                f"{self.finetuned.encoder_learning_rate}: a policy reads the vectors of its own encoder, and "
                "fine-tuning changes it; set the rate to 0, or train the policy"
            )
        if self.policy.relevance not in (None, self.chunks.retriever):
            raise ValueError(
                f"policy.relevance is {self.policy.relevance!r}, chunks.retriever {self.chunks.retriever!r}: when "
                "served, passages are found by the store's; name the same"
            )
        return self

    def section(self, name: str) -> dict[str, Any]:
        """The plain values of one section, as manifests record them."""
        return self.model_dump(mode="json")[name]
