"""Which reading tasks CPT has."""

from __future__ import annotations

from pydantic import Field, model_validator

from refrag_platform.recipes.base import Section, Share


class ReadingRecipe(Section):
    """Reading tasks without labels (ours): blanks and quotes over passages of the corpus."""

    steps_share: Share = Field(
        0.85, gt=0, lt=1, description="share of the steps that ask; the others continue windows of text"
    )
    blocks: int = Field(16, ge=1, description="questions asked at once over one context, each unseen by the others")
    block_tokens: int = Field(48, ge=16, description="of a question in the decoder's chat format and its answer")
    quotes_share: Share = Field(
        0.3,
        ge=0,
        le=1,
        description="share of the questions that quote a passage and ask how it goes on; the others are blanks",
    )
    quotes_weight: float = Field(0.5, ge=0, description="weight of the loss on quotes beside that on the others")
    questions_share: Share = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the contexts that are passages of questions, which are asked in up to half of the blocks",
    )
    questions: list[str] = Field(
        default_factory=list,
        description="question files (rows id, question, answers, passages, gold) beside the corpus' own; a row that "
        "lists its gold passages alone is asked among those of the rows near it in its file",
    )
    renamed_share: Share = Field(
        0.5,
        ge=0,
        le=1,
        description="share of those contexts with other names and numbers, new ones each time, in passages, questions "
        "and answers: few passages are soon known by heart",
    )
    kept_steps_share: Share = Field(
        0.4, ge=0, le=1, description="share of those steps in which some chunks are kept as tokens, at random"
    )
    most_share_kept: Share = Field(0.15, gt=0, le=1, description="of a context's chunks in such a step, at most")
    first_rate_share: Share | None = Field(
        None,
        ge=0,
        le=1,
        description="share of those steps that read chunks one by one, at the first of encoder.rates; the others draw "
        "one of the rest; null: each rate as often as another",
    )

    @model_validator(mode="after")
    def _asks(self) -> ReadingRecipe:
        if self.quotes_share == 1 and not self.quotes_weight:
            raise ValueError("quotes_share is 1 and quotes_weight 0: nothing would be learned; raise quotes_weight")
        if not self.quotes_share:
            self.refuse_idle("quotes_share is 0", "quotes_weight")
        if not self.questions_share:
            self.refuse_idle("questions_share is 0", "questions", "renamed_share")
        if not self.kept_steps_share:
            self.refuse_idle("kept_steps_share is 0", "most_share_kept")
        return self
