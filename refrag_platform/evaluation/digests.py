"""What a result of `refrag evaluate rag` is of: hashes of the weights and of the questions, to compare others with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from refrag_platform.model.loading import Bundle
from refrag_platform.names import name_text


def judged_digests(bundle: Bundle, retriever: str | None, questions: Sequence[Path]) -> dict[str, Any]:
    """SHA-256 of {decoder, encoder, projection, policy, retriever, questions: {file: of its bytes}}.

    Args: retriever: the digest of the one that says how near passages are; None where none does.
    """
    files = {}
    for path in questions:
        with path.open("rb") as stream:
            files[name_text(path)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return {**bundle.digests(), "retriever": retriever, "questions": files}


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first thing in which two `judged_digests` differ, with both hashes; None where they don't.

    Of the questions count the files whose names, without folders, both have.
    """
    pairs = [(name, one[name], other[name]) for name in one if name != "questions"]
    files, others = (
        {PurePath(path).name: digest for path, digest in each["questions"].items()} for each in (one, other)
    )
    pairs += [(f"file of questions, {name}", files[name], others[name]) for name in files if name in others]
    return next((f"{name}: {_said(a)} and {_said(b)}" for name, a, b in pairs if a != b), None)


def _said(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
