"""POST /v1/embeddings: the retriever's sentence vectors, by which the store is searched."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, Tag, field_validator, model_validator

from refrag_platform.limits import MOST_TEXTS
from refrag_platform.serving.fields import TEXT_OR_LIST, Body, Name, RequestText, fault, require_characters
from refrag_platform.serving.schema import FullText


class EmbeddingRequest(Body):
    """Body of POST /v1/embeddings."""

    model: Name
    input: Annotated[
        Annotated[FullText, Tag("text")]
        | Annotated[list[FullText], Field(min_length=1, max_length=MOST_TEXTS), Tag("list")],
        TEXT_OR_LIST,
    ] = Field(description="one text or several; the retriever reads the beginning of a longer one, as of a passage")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: of the little-endian float32 values"
    )
    dimensions: int | None = Field(None, ge=1, description="the retriever's own; no other is to be had")
    user: RequestText | None = Field(None, description="for the client's own use")

    @field_validator("input", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], int | list):
            raise fault(
                "unsupported_value",
                "token ids can't be embedded, for they are another tokenizer's; send texts (LangChain's "
                "OpenAIEmbeddings does with check_embedding_ctx_length=False)",
            )
        return value

    @model_validator(mode="after")
    def _fits(self) -> EmbeddingRequest:
        require_characters(sum(map(len, self.texts())), "the texts", "input")
        return self

    def texts(self) -> list[str]:
        """What is to be embedded."""
        return [self.input] if isinstance(self.input, str) else self.input


def embeddings_body(asked: EmbeddingRequest, vectors: NDArray[np.float32], tokens: int) -> dict[str, Any]:
    """OpenAI's list of embeddings; vectors: [n, dim]."""
    as_base64 = asked.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": number,
            "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode() if as_base64 else row.tolist(),
        }
        for number, row in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": asked.model, "usage": usage}
