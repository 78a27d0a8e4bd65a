"""Which beginnings are found again, and how much is kept."""

import numpy as np
import torch
from torch import Tensor

from refrag_platform.decoding.prefix import PrefixCache
from refrag_platform.decoding.prompts import prompt_content
from refrag_platform.model.segments import Chunks, Text, chunk_tokens

IDS = chunk_tokens(list(range(10, 90)), 4)


def content_of(keep: list[int] = [], ids: Tensor = IDS, stored: bool = True) -> np.ndarray:  # noqa: B006
    flags = torch.zeros(len(ids), dtype=torch.bool)
    flags[keep] = True
    vectors = torch.zeros(len(ids), 2, dtype=torch.float16 if stored else torch.float32)
    return prompt_content([Text([1, 2, 3]), Chunks(ids, flags, vectors), Text([4])], 4)


def states(begin: int, end: int) -> Tensor:
    """Stands for keys and values: each position holds its own number."""
    return torch.arange(begin, end, dtype=torch.float32)[None, None, None, :, None]


def filled(content: np.ndarray, blocks: int = 100) -> PrefixCache:
    cache = PrefixCache("encoder", blocks * 4 * 10, 10, block=4)
    cache.keep(cache.keys(content), states)
    return cache


def found(cache: PrefixCache, content: np.ndarray) -> int:
    """Positions that are found; they must be the first ones."""
    got = cache.find(cache.keys(content))
    if got is None:
        return 0
    assert got.flatten().tolist() == list(range(got.shape[3]))
    return got.shape[3]


def test_a_whole_prompt_is_found_but_for_its_last_position() -> None:
    content = content_of()
    assert len(content) == 24
    assert found(filled(content), content) == 20
    assert found(filled(content), np.concatenate([content, content])) == 20


def test_another_expansion_is_another_prompt_from_there_on() -> None:
    cache = filled(content_of())
    assert found(cache, content_of([9])) == 12  # 3 tokens and 9 chunks agree
    assert found(cache, content_of([0])) == 0
    assert found(filled(content_of([9])), content_of([10])) == 12


def test_a_kept_chunk_is_the_same_as_its_tokens_as_text() -> None:
    written = prompt_content([Text([1, 2, 3, *range(10, 14)]), Chunks(IDS[1:], vectors=torch.zeros(19, 2).half())], 4)
    assert found(filled(content_of([0])), written) == 24


def test_other_tokens_other_encoders_other_salts_and_other_rounding_are_not_found() -> None:
    cache = filled(content_of())
    changed = IDS.clone()
    changed[12, 3] += 1
    assert found(cache, content_of(ids=changed)) == 12
    assert found(cache, content_of(stored=False)) == 0
    assert PrefixCache("another", 1, 1, block=4).keys(content_of())[0] != cache.keys(content_of())[0]
    assert not set(cache.keys(content_of(), "acme")) & set(cache.keys(content_of()))


def test_a_block_after_another_beginning_is_another_block() -> None:
    shifted = IDS.roll(4, 0)
    assert found(filled(content_of(ids=shifted)), content_of()) == 0


def test_memory_is_bounded_and_the_longest_unused_goes_first() -> None:
    cache = PrefixCache("encoder", 7 * 4 * 10 + 39, 10, block=4)
    old, used, new = (content_of(ids=chunk_tokens(list(range(a, a + 32)), 4)) for a in (100, 200, 300))
    for content in (old, used):
        cache.keep(cache.keys(content), states)  # 2 blocks each
    assert found(cache, used) == found(cache, old) == 8
    assert found(cache, used) == 8
    cache.keep(cache.keys(new), states)
    cache.keep(cache.keys(content_of()), states)  # 5 blocks: only used or new have room beside it
    assert len(cache) == cache.max_blocks == 7
    assert found(cache, content_of()) == 20
    assert (found(cache, old), found(cache, used), found(cache, new)) == (0, 0, 8)


def test_a_prompt_above_the_bound_keeps_its_beginning() -> None:
    content = content_of()
    assert found(filled(content, 3), content) == 12
    assert found(filled(content, 0), content) == 0
