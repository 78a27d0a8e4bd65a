"""What the chunks stage writes: names, schema and description of the store's content folder.

passages.parquet, chunks-00000.safetensors, ... and store.json; docs/architecture.md lists the columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refrag_platform.errors import ArtifactError
from refrag_platform.files import write_json
from refrag_platform.recipes import ChunksRecipe

if TYPE_CHECKING:
    import pyarrow as pa

    from refrag_platform.corpus.question import Passage

FORMAT = 1
PASSAGES_FILE, DESCRIPTION_FILE = "passages.parquet", "store.json"


@dataclass(frozen=True)
class StoreDescription:
    """store.json: who made the vectors, and how many there are.

    files: name and number of chunks of each chunk file, in order; chunk numbers run on over the files.
    digests: MD5 of each file, by name; older stores have none. index_from: the recipe's chunks.index_from.
    """

    model: str
    encoder_digest: str
    tokenizer_digest: str
    chunk_size: int
    vector_dim: int
    retriever: str
    retriever_digest: str
    retriever_dim: int
    passages: int
    chunks: int
    files: dict[str, int]
    digests: dict[str, str] = field(default_factory=dict)
    index_from: int = ChunksRecipe().index_from
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write store.json, last of all files: a folder without it is not a store."""
        write_json(folder / DESCRIPTION_FILE, asdict(self), sort_keys=True)

    @classmethod
    def read(cls, folder: Path) -> StoreDescription:
        """store.json of a content folder.

        Raises:
            ArtifactError: there is none, or it is of another format.
        """
        path = folder / DESCRIPTION_FILE
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(
                f"{folder} holds no chunk store: {DESCRIPTION_FILE} is missing; "
                "make one with `refrag run chunks --model NAME`"
            ) from None
        except json.JSONDecodeError as error:
            raise ArtifactError(f"{path} is damaged ({error}); run `refrag run chunks --force` again") from None
        if values.get("format") != FORMAT:
            raise ArtifactError(f"{path} has format {values.get('format')!r}; this version reads {FORMAT}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ArtifactError(f"{path} is damaged ({error}); run `refrag run chunks --force` again") from None

    def require_encoder(self, digest: str) -> None:
        """Refuse vectors that another encoder made: the decoder would read them as noise.

        Raises:
            ArtifactError: it names both digests and the command that mends the store.
        """
        if digest != self.encoder_digest:
            raise ArtifactError(
                f"the chunk store was made by encoder {self.encoder_digest}, the model has encoder {digest}; "
                f"make the store again with `refrag run chunks --model {self.model}`"
            )


def chunk_file(number: int) -> str:
    return f"chunks-{number:05}.safetensors"


def passage_schema(retriever_dim: int) -> pa.Schema:
    """Columns of passages.parquet."""
    import pyarrow as pa

    return pa.schema(
        [
            ("id", pa.string()),
            ("document_id", pa.string()),
            ("title", pa.string()),
            ("text", pa.string()),
            ("chunk_start", pa.int64()),
            ("chunk_count", pa.int32()),
            ("retrieval_vector", pa.list_(pa.float32(), retriever_dim)),
        ]
    )


def stored_passages(content: Path, wanted: Iterable[Passage]) -> set[Passage]:
    """Those of the passages (title, text) that a store holds."""
    import pyarrow.parquet as parquet

    left, present = set(wanted), set()
    for batch in parquet.ParquetFile(content / PASSAGES_FILE).iter_batches(columns=["title", "text"]):
        present |= left.intersection(zip(*(batch.column(name).to_pylist() for name in ("title", "text")), strict=True))
    return present
