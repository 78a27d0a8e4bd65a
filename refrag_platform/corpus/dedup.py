"""Exact duplicates: the first document with a text stays. Memory: 16 to 32 bytes a document."""

from __future__ import annotations

import numpy as np


class FingerprintSet:
    """A set of 64-bit fingerprints by open addressing; at 10 million texts a false hit has odds of 3e-6."""

    def __init__(self) -> None:
        self._slots = np.zeros(1 << 10, dtype=np.uint64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, sha256: str) -> bool:
        """Remember a text by its hash; True if it is new."""
        fingerprint = int(sha256[:16], 16) or 1  # 0 marks a free slot
        slot = self._find(fingerprint)
        if self._slots[slot] == fingerprint:
            return False
        self._slots[slot] = fingerprint
        self._count += 1
        if 2 * self._count > len(self._slots):
            self._grow()
        return True

    def _find(self, fingerprint: int) -> int:
        """The slot that holds `fingerprint`, or the free one where it belongs."""
        mask = len(self._slots) - 1
        slot = fingerprint & mask
        while self._slots[slot] and self._slots[slot] != fingerprint:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._slots[self._slots != 0]
        self._slots = np.zeros(2 * len(self._slots), dtype=np.uint64)
        for fingerprint in old.tolist():
            self._slots[self._find(fingerprint)] = fingerprint
