"""The service reads one store at several compression rates: a request says how many chunks share a vector."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from refrag_platform.model.prompts import question_frame
from refrag_platform.model.segments import Chunks
from refrag_platform.serving.contract import Message, ServedPassage
from refrag_platform.serving.engine import Engine
from tests.command import refrag, refused
from tests.serving.conftest import COUNTRIES, SHARE_KEPT, Server
from tests.serving.test_refrag_field import SHAPES, passages_of, refrag_of

QUESTION = "What is the capital of Peru?"
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def coarse(engine: Engine) -> Iterator[Engine]:
    """The engine of a model that is trained for pairs of chunks, too."""
    model = copy.copy(engine.bundle.model)
    model.rates = (1, 2)
    both = Engine("tiny", replace(engine.bundle, model=model), engine.store, engine.settings)
    yield both
    both.close()


@pytest.fixture(scope="module")
def coarse_url(server: Server, coarse: Engine) -> Iterator[str]:
    with server(engine=coarse) as address:
        yield address


@pytest.mark.parametrize("path", SHAPES)
def test_a_request_says_the_rate_and_every_chunk_is_so_much_larger(coarse_url: str, path: str) -> None:
    fine, pairs = (refrag_of(coarse_url, path, refrag={"rate": rate}) for rate in (1, 2))
    assert (fine["rate"], pairs["rate"]) == (1, 2) and refrag_of(coarse_url, path)["rate"] == 1
    chunks = {name: passage["chunks"] for name, passage in passages_of(fine).items()}
    assert {name: passage["chunks"] for name, passage in passages_of(pairs).items()} == {
        name: -(-count // 2) for name, count in chunks.items()
    }
    assert any(count % 2 for count in chunks.values())
    assert pairs["chunks_expanded"] == round(SHARE_KEPT * pairs["chunks"])
    assert pairs["plain_prompt_tokens"] == fine["plain_prompt_tokens"]
    assert pairs["compression_rate"] > fine["compression_rate"]
    for passage in passages_of(pairs).values():
        assert len(passage["selection"]) == passage["chunks"]
        text = COUNTRIES[passage["title"]]
        told = "".join(text[chunk["start"] : chunk["end"]] for chunk in passage["selection"])
        assert told.replace(" ", "") == text.replace(" ", "")


def test_the_store_s_vectors_are_pooled_and_say_what_the_text_s_do(coarse: Engine) -> None:
    found = coarse.retrieve(QUESTION, 4)
    sent = [ServedPassage(passage.id, passage.title, passage.text, passage.score) for passage in found]
    bundle = replace(coarse.bundle, model=coarse.bundle.model.at_rate(2))
    stored, encoded = (
        [one.chunks for one in coarse._prompts.select(bundle, read, 0, QUESTION)] for read in (found, sent)
    )
    for passage, pooled, own in zip(found, stored, encoded, strict=True):
        assert passage.token_ids is not None and pooled.vectors is not None and own.vectors is not None
        # To the last bit the store's, so nothing was encoded.
        wanted = Chunks(passage.token_ids, vectors=passage.vectors).at_rate(2).vectors
        assert pooled.vectors.dtype == torch.float16 and torch.equal(pooled.vectors, wanted)
        assert torch.equal(pooled.token_ids, own.token_ids)
        close(pooled.vectors.float(), own.vectors.float(), atol=0.01, rtol=0.01)


def test_a_prompt_s_beginning_is_reused_at_its_own_rate_alone(coarse: Engine) -> None:
    passage = ServedPassage("rivers", "Rivers", " ".join(f"River {number} is long." for number in range(60)))

    def reused(rate: int) -> int:
        generation = coarse.start([Message("user", QUESTION)], [passage], share_kept=0, rate=rate)
        list(generation)
        return generation.usage.positions_reused

    opening, *_ = question_frame(coarse.bundle.model.tokenizer)
    assert max(reused(1), reused(2)) <= len(opening) < min(reused(1), reused(2))


def test_what_is_not_read_is_counted_at_the_rate_that_was_asked_for(coarse_url: str) -> None:
    asked = [{"role": "user", "content": "Who wrote Hamlet?"}]
    refused = refrag_of(coarse_url, messages=asked, refrag={"rate": 2})
    fine = refrag_of(coarse_url, messages=asked)
    assert not refused["answered"] and refused["rate"] == 2 and refused["chunks"] < fine["chunks"]


def test_a_shell_asks_at_a_rate(coarse_url: str, url: str) -> None:
    ask = ["ask", QUESTION, "--max-tokens", "2", "--passages", "4", "--share-kept", "0", "--url"]
    positions = []
    for rate in (1, 2):
        run = refrag(*ask, coarse_url, "--rate", rate)
        positions.append(int(run.stderr.split("x: ")[1].split(" positions")[0]))
    assert positions[1] < positions[0]
    assert "trained for 1" in refused(*ask, url, "--rate", "2")
