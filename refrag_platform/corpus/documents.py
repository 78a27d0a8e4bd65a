"""What passes through the corpus stage: documents, their titled sections and the facts they hold."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class DocumentSection:
    """A titled stretch of a document, `text[start:end]`; passages are cut inside sections, never across."""

    title: str
    start: int
    end: int


@dataclass(frozen=True)
class Fact:
    """A question whose answer is known. `answers[0]` stands literally in section number `section`."""

    field: str
    question: str
    answers: tuple[str, ...]
    section: int


@dataclass(frozen=True)
class Document:
    """A normalized text with a stable id. `group` decides the split: parts of one file share theirs."""

    id: str
    title: str
    source: str
    text: str
    sections: tuple[DocumentSection, ...]
    facts: tuple[Fact, ...] = ()
    group: str = ""

    @property
    def sha256(self) -> str:
        """Hash of the text: equal texts are duplicates."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def plain_document(id: str, title: str, source: str, text: str, group: str = "") -> Document:
    """A document of one section."""
    return Document(id, title, source, text, (DocumentSection(title, 0, len(text)),), group=group or id)
