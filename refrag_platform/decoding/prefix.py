"""Keys and values of prompts' beginnings, kept for the next prompt that begins the same way.

A prompt is cut into blocks of positions. A block's key is the hash of the key before it and of what stands at its
positions: token ids, or the token ids behind a chunk's vector. So a key stands for the whole prompt up to there,
expansion mask included, and a chunk that is compressed in one prompt and kept in the next never matches.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 32


class PrefixCache:
    """Blocks of keys and values by content, least recently used first out. Not for two threads at once.

    Args:
        encoder_digest: of the encoder whose vectors the prompts hold. max_bytes: of all blocks together.
        bytes_per_position: of keys and values.
    """

    def __init__(self, encoder_digest: str, max_bytes: int, bytes_per_position: int, block: int = BLOCK) -> None:
        self._root = encoder_digest.encode()
        self.block = block
        self.max_blocks = max_bytes // (block * bytes_per_position)
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        """Blocks that are kept."""
        return len(self._blocks)

    def keys(self, content: NDArray[np.int32], salt: str = "") -> list[bytes]:
        """A key for each whole block of a prompt's content (`PromptInput.content`), the last position left out:
        it must be read in any case, for its logits.

        Args: salt: prompts of another one never match.
        """
        keys, key = [], self._root + b"\0" + salt.encode()
        for begin in range(0, (len(content) - 1) // self.block * self.block, self.block):
            key = hashlib.blake2b(key + content[begin : begin + self.block].tobytes(), digest_size=16).digest()
            keys.append(key)
        return keys

    def find(self, keys: Sequence[bytes]) -> Tensor | None:
        """Keys and values of the longest known beginning, [layers, 2, kv_heads, positions, head_dim]."""
        known = 0
        while known < len(keys) and keys[known] in self._blocks:
            known += 1
        # The first block last: a beginning must not be dropped before what needs it.
        for key in reversed(keys[:known]):
            self._blocks.move_to_end(key)
        return torch.cat([self._blocks[key] for key in keys[:known]], dim=3) if known else None

    def keep(self, keys: Sequence[bytes], read: Callable[[int, int], Tensor]) -> None:
        """Keep the blocks that are not known yet; `read(begin, end)` gives the keys and values of positions."""
        keys = keys[: self.max_blocks]
        new = [number for number, key in enumerate(keys) if key not in self._blocks]
        if new:
            states = read(new[0] * self.block, len(keys) * self.block)
            for number in new:
                begin = (number - new[0]) * self.block
                self._blocks[keys[number]] = states[:, :, :, begin : begin + self.block].clone()
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        while len(self._blocks) > self.max_blocks:
            self._blocks.popitem(last=False)
