"""What an answer says of its passages: which are cited, and why each chunk was kept or compressed."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from refrag_platform.model.prompts import passage_text
from refrag_platform.serving.contract import ChunkRead, Citation, ServedPassage, Sources
from refrag_platform.serving.selecting import Selected

SNIPPET_CHARACTERS = 240


def chunk_spans(tokenizer: PreTrainedTokenizerFast, title: str, text: str, chunk_size: int) -> list[tuple[int, int]]:
    """Where each chunk of a passage lies in its text, in characters; (0, 0) where it lies in the title."""
    # As `content_ids` reads it.
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
    offsets = tokenizer(passage_text(title, text), **options)["offset_mapping"]
    before = len(title) + 1 if title else 0

    def place(at: int) -> int:
        return min(max(at - before, 0), len(text))

    firsts = range(0, len(offsets), chunk_size)
    lasts = [min(first + chunk_size, len(offsets)) - 1 for first in firsts]
    return [(place(offsets[first][0]), place(offsets[last][1])) for first, last in zip(firsts, lasts, strict=True)]


def citation(passage: ServedPassage, selected: Selected, spans: Sequence[tuple[int, int]] = ()) -> Citation:
    """A passage that was read; without spans, of one that wasn't, nothing is said of its chunks."""
    keep = selected.chunks.keep.tolist()
    scores: Sequence[float | None] = selected.scores or [None] * len(keep)
    return Citation(
        id=passage.id,
        title=passage.title,
        score=passage.score,
        text=_snippet(passage.text),
        chunks=len(keep),
        chunks_expanded=sum(keep),
        selection=[
            ChunkRead(start, end, None if score is None else round(score, 4), kept)
            for (start, end), score, kept in zip(spans, scores, keep, strict=False)
        ],
    )


def split_by_kept(read: list[Citation]) -> Sources:
    """Which of the passages that were read are cited; where no chunk was kept, nobody chose among them."""
    if not any(one.chunks_expanded for one in read):
        return Sources(read, [])
    return Sources([one for one in read if one.chunks_expanded], [one for one in read if not one.chunks_expanded])


def _snippet(text: str) -> str:
    """The start of a passage, cut at a word."""
    if len(text) <= SNIPPET_CHARACTERS:
        return text
    return text[:SNIPPET_CHARACTERS].rsplit(" ", 1)[0] + " …"
