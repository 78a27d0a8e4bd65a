"""The input of one prompt equals the model's own, and its content tells prompts apart."""

import pytest
import torch

from refrag_platform.decoding.prompts import prompt_content, prompt_input
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Prompt, Text, chunk_tokens, prompt_length
from tests.encoders import ENCODERS, model_with


@pytest.mark.parametrize("keep", [[0] * 6, [1] * 6, [0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0]])
@pytest.mark.parametrize("vectors", ["encoded when needed", "float32", "float16"])
@torch.inference_mode()
def test_the_input_is_the_model_s_own(model: RefragModel, keep: list[int], vectors: str) -> None:
    k = model.chunk_size
    ids = chunk_tokens(list(range(3, 3 + 5 * k + 2)), k)
    flags = torch.tensor(keep, dtype=torch.bool)
    stored = None if "when" in vectors else model.encode(ids).cpu().to(getattr(torch, vectors))
    rest = None if stored is None else stored[1:]
    prompt: Prompt = [Text([5, 6]), Chunks(ids, flags, stored), Chunks(ids[1:], flags[1:], rest), Text([9])]
    made = prompt_input(model, prompt)
    torch.testing.assert_close(made.embeds, model.embed([prompt]).embeds[0], atol=1e-5, rtol=1e-5)
    positions, width = made.content.shape
    # A vector of a whole passage is told apart by its passage, too.
    assert positions == prompt_length(prompt)
    assert width > 1 + k if model.encoder.window_chunks > 1 else width == 1 + k


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.inference_mode()
def test_what_a_vector_was_made_of_is_part_of_the_content(encoder: str) -> None:
    reader = model_with(encoder)
    ids = chunk_tokens(list(range(3, 25)), reader.chunk_size)
    keep = torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool)
    prompt: Prompt = [Text([5]), Chunks(ids, keep), Chunks(ids[2:], keep[2:], reader.encode(ids[2:]).half())]
    made = prompt_input(reader, prompt)
    torch.testing.assert_close(made.embeds, reader.embed([prompt]).embeds[0], atol=1e-4, rtol=1e-3)
    # The same beginning, chunk by chunk, of a passage that ends otherwise.
    other = prompt_input(reader, [Text([5]), Chunks(ids[:4], keep[:4])])
    alike = (made.content[:7] == other.content[:7]).all(1)
    assert alike.tolist() == [True, encoder in {"chunk", "layers"}, *[True] * 4, encoder in {"chunk", "layers"}]


def test_content_says_what_stands_at_each_position() -> None:
    keep = torch.tensor([False, True])
    ids = chunk_tokens([7, 8, 9, 10, 11], 4)
    rows = prompt_content([Text([1]), Chunks(ids, keep), Chunks(ids, ~keep, torch.zeros(2, 3).half())], 4).tolist()
    folded, tail = [7, 8, 9, 10], [11, -1, -1, -1]
    assert rows[0] == [0, 1, -1, -1, -1]
    assert rows[1] == [2, *folded] and rows[2] == [0, *tail]
    assert [row[:2] for row in rows[3:7]] == [[0, token] for token in folded]
    # Vectors of a store are rounded: they are another content than those that are encoded now.
    assert rows[7] == [1, *tail]


def test_bad_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        prompt_content([], 4)
    with pytest.raises(ValueError, match="chunks of 4 tokens; the model's k is 8"):
        prompt_content([Chunks(chunk_tokens([1, 2], 4))], 8)
