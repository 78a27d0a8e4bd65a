"""Several compression rates from one store: its vectors, pooled, are those that the model makes of the text."""

from pathlib import Path
from typing import Any

import pytest
import torch

from refrag_platform.errors import RefragError
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Text, chunk_tokens, unchunk
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe
from tests.conftest import ROOT
from tests.encoders import ENCODERS, model_with

K, RATES = 4, (1, 2, 4)
close = torch.testing.assert_close


@pytest.fixture(scope="module", params=ENCODERS)
def model(request: pytest.FixtureRequest) -> RefragModel:
    model = model_with(request.param)
    model.rates = RATES
    return model


def tokens(count: int) -> list[int]:
    return torch.randint(3, 900, (count,), generator=torch.Generator().manual_seed(count)).tolist()


# One token, less than a group, whole groups, a part of one, and windows that end within a group.
LENGTHS = (1, 7, 16, 32, 33, 70, 130, 161)


@torch.no_grad()
@pytest.mark.parametrize("rate", RATES)
def test_a_vector_is_the_mean_of_its_passage_s_own_chunks(model: RefragModel, rate: int) -> None:
    coarse = model.at_rate(rate)
    cut = [chunk_tokens(tokens(count), coarse.chunk_size) for count in LENGTHS]
    together = coarse.with_vectors([Chunks(ids) for ids in cut])
    for count, ids, passage in zip(LENGTHS, cut, together, strict=True):
        fine = model.encode(chunk_tokens(tokens(count), K))
        wanted = torch.stack([part.mean(0) for part in fine.split(rate)])
        close(coarse.encode(ids), wanted, atol=1e-4, rtol=1e-4)
        assert passage.vectors is not None
        close(passage.vectors, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rate", RATES)
def test_a_stored_passage_is_read_as_its_text_is(model: RefragModel, rate: int) -> None:
    coarse, prompts = model.at_rate(rate), []
    for stored in (True, False):
        prompt: list[Text | Chunks] = [Text([5, 6])]
        for count in LENGTHS:
            fine = chunk_tokens(tokens(count), K)
            passage = (
                Chunks(fine, vectors=model.encode(fine), relevance=0.5).at_rate(rate)
                if stored
                else Chunks(chunk_tokens(tokens(count), coarse.chunk_size))
            )
            assert unchunk(passage.token_ids) == tokens(count)
            keep = torch.zeros(len(passage.token_ids), dtype=torch.bool)
            keep[-1] = count > 100
            prompt.append(passage.kept(keep))
        prompts.append(prompt)
    stored_inputs, inputs = coarse.embed(prompts[:1]), coarse.embed(prompts[1:])
    close(stored_inputs.embeds, inputs.embeds, atol=1e-3, rtol=1e-3)
    chunks = sum(-(-count // (K * rate)) for count in LENGTHS)
    # Two passages keep their last chunk, of 2 and 1 tokens.
    assert inputs.embeds.shape[1] == 2 + chunks + {1: 1, 2: 1, 4: 1}[rate]


@torch.no_grad()
def test_half_precision_stays_half_and_relevance_is_kept() -> None:
    ids = chunk_tokens(tokens(22), K)
    vectors = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    pooled = Chunks(ids, vectors=vectors.half(), relevance=0.25).at_rate(4)
    assert pooled.vectors is not None and pooled.vectors.dtype == torch.float16 and pooled.relevance == 0.25
    close(pooled.vectors.float(), torch.stack([vectors[:4].mean(0), vectors[4:].mean(0)]), atol=2e-3, rtol=2e-3)


def test_a_rate_that_was_not_trained_is_refused_and_others_are_saved(tmp_path: Path) -> None:
    model = model_with("layers, passage")
    assert model.at_rate(1).chunk_size == K
    with pytest.raises(RefragError, match=r"rate is 2, and this model is trained for 1; .* encoder\.rates"):
        model.at_rate(2)
    model.rates = (1, 2)
    coarse, digest = model.at_rate(2), model.encoder_digest()
    assert (coarse.chunk_size, model.chunk_size, coarse.at_rate(1).chunk_size) == (2 * K, K, K)
    # The vectors of the store are the same ones.
    assert coarse.encoder_digest() == digest and coarse.encoder is model.encoder
    coarse.save(tmp_path)
    loaded = RefragModel.load(tmp_path)
    assert (loaded.rates, loaded.rate, loaded.encoder_digest()) == ((1, 2), 1, digest)


@pytest.mark.parametrize(
    ("rates", "context", "message"),
    [
        ([], 128, "at least 1 item"),
        ([2, 4], 128, "begin with 1"),
        ([1, 4, 2], 128, "go up"),
        ([1, 2, 2], 128, "go up"),
        ([1, 64], 128, "the last of encoder.rates .256."),
    ],
)
def test_wrong_rates_are_refused_by_name(rates: list[int], context: int, message: str) -> None:
    values: dict[str, Any] = Project(ROOT).recipe("tiny").model_dump(mode="json")
    values["encoder"]["rates"] = rates
    values["cpt"]["context_tokens"] = context
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(values)


def test_a_share_of_the_first_rate_needs_others() -> None:
    values: dict[str, Any] = Project(ROOT).recipe("tiny").model_dump(mode="json")
    values["cpt"] |= {"curriculum": None, "repeat_steps_share": 0, "reading": {"first_rate_share": 0.8}}
    values["encoder"]["rates"] = [1, 2]
    assert Recipe.model_validate(values).cpt.reading is not None
    values["encoder"]["rates"] = [1]
    with pytest.raises(ValueError, match=r"first_rate_share is 0\.8, and encoder\.rates has one"):
        Recipe.model_validate(values)
