"""Compress anywhere: what a prompt is laid out to."""

import pytest
import torch

from refrag_platform.model.segments import (
    PAD,
    Chunks,
    Layout,
    Text,
    chunk_tokens,
    compression_rate,
    lay_out,
    lay_slots,
    plain_tokens,
    prompt_length,
    unchunk,
    window_layout,
    window_numbers,
)


def flags(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def compressed(layout: Layout) -> torch.Tensor:
    """The chunks that `chunk_index` numbers, [M, k]."""
    return torch.cat([passage.token_ids[~passage.keep] for passage in layout.passages])


def test_the_last_chunk_is_padded_and_comes_back_without_padding() -> None:
    chunks = chunk_tokens([5, 6, 7, 8, 9], 4)
    assert chunks.tolist() == [[5, 6, 7, 8], [9, PAD, PAD, PAD]]
    assert unchunk(chunks) == [5, 6, 7, 8, 9]


def test_a_chunk_takes_one_position_and_an_expanded_one_its_real_tokens() -> None:
    passage = Chunks(chunk_tokens([1, 2, 3, 4, 5], 2), flags(0, 1, 1))
    prompt = [Text([10, 11]), passage, Text([12])]
    assert prompt_length(prompt) == 2 + 1 + 2 + 1 + 1
    assert plain_tokens(prompt) == [10, 11, 1, 2, 3, 4, 5, 12]
    layout = lay_out([prompt], 2)
    assert layout.token_ids.tolist() == [[10, 11, 0, 3, 4, 5, 12]]
    assert layout.chunk_index.tolist() == [[-1, -1, 0, -1, -1, -1, -1]]
    assert compressed(layout).tolist() == [[1, 2]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_text_and_chunks_come_in_any_order_and_batches_are_padded_on_the_chosen_side() -> None:
    first = [Chunks(chunk_tokens([1, 2], 2)), Text([7]), Chunks(chunk_tokens([3, 4], 2))]
    second = [Text([8])]
    left, right = lay_out([first, second], 2, "left"), lay_out([first, second], 2, "right")
    assert left.chunk_index.tolist() == [[0, -1, 1], [-1, -1, -1]]
    assert left.attention_mask.tolist() == [[True] * 3, [False, False, True]]
    assert right.attention_mask.tolist() == [[True] * 3, [True, False, False]]
    assert left.position_ids[1].tolist() == [0, 0, 0]


def test_vectors_are_those_of_the_compressed_chunks_in_order() -> None:
    vectors = torch.arange(6.0).view(3, 2)
    passage = Chunks(chunk_tokens([1, 2, 3, 4, 5, 6], 2), flags(0, 1, 0), vectors)
    assert passage.compressed_vectors().tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert lay_out([[passage]], 2).passages == [passage]
    assert lay_out([[passage.kept(flags(1, 1, 1))]], 2).passages == []


def test_a_prompt_of_nothing_but_one_chunk_has_its_vector() -> None:
    layout = lay_out([[Chunks(chunk_tokens([1, 2], 2))]], 2)
    assert layout.chunk_index.tolist() == [[0]] and layout.attention_mask.tolist() == [[True]]


def test_slots_have_room_for_as_many_chunks_as_are_asked_for() -> None:
    prompts = [[Text([9]), Chunks(chunk_tokens([1, 2, 3], 2), flags(0, 1)), Chunks(chunk_tokens([4], 2))], [Text([8])]]
    slots, owners, chunks, keep = lay_slots(prompts, 2, least_chunks=4)
    assert slots.tolist() == [[9, 1, 2, 3, PAD, 4, PAD], [8] + [PAD] * 6]
    assert owners.tolist() == [[-1, 0, 0, 1, 1, 2, 2], [-1] * 7]
    assert chunks[0].tolist() == [[1, 2], [3, PAD], [4, PAD], [PAD, PAD]] and bool((chunks[1] == PAD).all())
    assert keep.tolist() == [[False, True, False, False], [False] * 4]


def test_compression_counts_the_whole_prompt_in_tokens_and_positions() -> None:
    question, passage = Text([5] * 10), Chunks(chunk_tokens(list(range(30)), 8))  # the last chunk has six tokens
    prompt = [passage, question]
    assert compression_rate(len(plain_tokens(prompt)), prompt_length(prompt)) == round(40 / (4 + 10), 4)
    # Of long passages alone it is the paper's effective rate, k / (1 - p + k p).
    kept = Chunks(chunk_tokens(list(range(8 * 100)), 8), flags(*[1, 0, 0, 0] * 25))
    assert compression_rate(len(plain_tokens([kept])), prompt_length([kept])) == round(8 / (0.75 + 8 * 0.25), 4)
    assert compression_rate(10, prompt_length([question])) == 1.0


def test_window_layout_agrees_with_lay_out() -> None:
    context = torch.arange(1, 25).view(2, 4, 3)
    keep = torch.stack([flags(0, 1, 0, 0), flags(1, 0, 0, 0)])
    tokens, index = window_layout(context, keep, 99)
    general = lay_out([[Text([99]), Chunks(context[row], keep[row])] for row in range(2)], 3)
    assert tokens.tolist() == general.token_ids.tolist()
    assert (index >= 0).tolist() == (general.chunk_index >= 0).tolist()
    assert torch.equal(context.flatten(0, 1)[index[index >= 0]], compressed(general))


def test_wrong_prompts_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        lay_out([[Text([])]], 2)
    with pytest.raises(ValueError, match="chunks of 3 tokens; the model's k is 2"):
        lay_out([[Chunks(chunk_tokens([1, 2, 3], 3))]], 2)
    with pytest.raises(ValueError, match="2 flags for 1 chunks"):
        Chunks(chunk_tokens([1], 2), flags(0, 1))
    with pytest.raises(ValueError, match="same number"):
        window_layout(torch.zeros(2, 2, 2, dtype=torch.long), torch.stack([flags(0, 1), flags(0, 0)]), 0)


def test_windows_are_numbered_as_the_encoder_cuts_them() -> None:
    assert window_numbers(5, 8).tolist() == [0] * 5
    assert window_numbers(9, 8).tolist() == [0] * 5 + [1] * 4
    assert window_numbers(3, 1).tolist() == [0, 1, 2]
