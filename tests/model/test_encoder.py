"""Encoders of every kind: what a vector depends on, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

from refrag_platform.errors import RecipeError
from refrag_platform.model import encoder as encoder_module
from refrag_platform.model.backbone import embedding_size, embedding_weight, first_layers, strip_backbone
from refrag_platform.model.encoder import BertEncoder, LayersEncoder, WindowLayout
from refrag_platform.model.fused import FusedLayers
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import PAD, Chunks, Text, chunk_tokens, cut_windows, plain_tokens, window_numbers
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe
from tests.conftest import ROOT
from tests.encoders import ENCODERS, WHOLE_PASSAGES, model_with, recipe_with
from tests.families import FAMILIES, family

K, WINDOW = 4, 16
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def models() -> dict[str, RefragModel]:
    return {name: model_with(name) for name in ENCODERS}


@pytest.fixture(params=ENCODERS)
def model(models: dict[str, RefragModel], request: pytest.FixtureRequest) -> RefragModel:
    return models[request.param]


def passage(tokens: int, seed: int = 0) -> Tensor:
    return chunk_tokens(torch.randint(3, 900, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist(), K)


def changed(chunks: Tensor, chunk: int) -> Tensor:
    other = chunks.clone()
    other[chunk] = (other[chunk] + 1).where(other[chunk] != PAD, PAD)
    return other


@torch.no_grad()
def test_vectors_of_a_passage_depend_neither_on_its_company_nor_on_padding(model: RefragModel) -> None:
    # One token, whole chunks, a part of one, a whole window, and passages of several windows.
    passages = [passage(tokens, seed) for seed, tokens in enumerate((1, 8, 30, 64, 65, 70, 130, 161))]
    alone = [model.encode(one) for one in passages]
    for at_once in (1, 50, 2048):
        for found, wanted in zip(model.encoder.encode_passages(passages, at_once), alone, strict=True):
            close(found, wanted, atol=1e-4, rtol=1e-4)
    padded = torch.full((len(passages), 60, K), PAD)
    for row, one in enumerate(passages):
        padded[row, : len(one)] = one
    together = model.encode(padded[None])[0]
    for row, wanted in enumerate(alone):
        close(together[row, : len(wanted)], wanted, atol=1e-4, rtol=1e-4)
    assert together.isfinite().all()


@torch.no_grad()
def test_a_cpu_encodes_few_tokens_at_once(model: RefragModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passages, encoded = [passage(tokens, tokens) for tokens in range(20, 32)], []
    hook = model.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(inputs[0].numel()))
    for most, batches in ((1024, 1), (130, 3)):
        monkeypatch.setattr(encoder_module, "CPU_BATCH_TOKENS", most)
        model.encoder.encode_passages(passages)
        assert len(encoded) == batches and max(encoded) <= most
        encoded.clear()
    hook.remove()


@torch.no_grad()
def test_rows_of_several_passages_have_the_vectors_of_each(model: RefragModel) -> None:
    passages = [passage(tokens, seed) for seed, tokens in enumerate((30, 8, 70, 64, 130))]
    chunks, windows = torch.full((2, 50, K), PAD), torch.full((2, 50), -1)
    for row, order in enumerate(((0, 1, 2), (4, 3))):
        at, number = 0, 0
        for one in (passages[place] for place in order):
            numbers = window_numbers(len(one), model.encoder.window_chunks)
            chunks[row, at : at + len(one)], windows[row, at : at + len(one)] = one, number + numbers
            at, number = at + len(one), number + int(numbers[-1]) + 1
    vectors = model.encoder.encode_rows(chunks, windows)
    for row, order in enumerate(((0, 1, 2), (4, 3))):
        wanted = torch.cat([model.encode(passages[place]) for place in order])
        close(vectors[row, : len(wanted)], wanted, atol=1e-4, rtol=1e-4)
    assert vectors.isfinite().all()


@torch.no_grad()
def test_rows_count_positions_as_the_backbone_does() -> None:
    config = RobertaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=80,
    )  # fmt: skip
    torch.manual_seed(0)
    table, embeddings = torch.randn(900, 32), torch.randn(900, 64)
    encoder = BertEncoder(strip_backbone(RobertaModel(config)), table, embeddings, K, "concat", False, False, 16).eval()
    one, other = passage(24) % 900, passage(16, 1) % 900
    rows = torch.cat([one, other])[None]
    windows = torch.tensor([[0] * len(one) + [1] * len(other)])
    close(encoder.encode_rows(rows, windows)[0], torch.cat([encoder(one), encoder(other)]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_saying_that_nothing_is_padded_changes_nothing(model: RefragModel) -> None:
    for chunks in (1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 3):
        together = torch.stack([passage(chunks * K, seed) for seed in range(3)])
        close(model.encode(together, padded=False), model.encode(together, padded=True), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("encoder", "before", "after"),
    [("chunk", False, False), ("passage", True, True), ("layers", False, False), ("layers, passage", True, False)],
)
def test_a_vector_knows_of_its_window_alone(
    models: dict[str, RefragModel], encoder: str, before: bool, after: bool
) -> None:
    model, chunks = models[encoder], passage(WINDOW * K)
    vectors = model.encode(chunks)
    for chunk in (0, 7, WINDOW - 1):
        moved = (model.encode(changed(chunks, chunk)) - vectors).abs().amax(1) > 1e-4
        assert moved[chunk]
        assert moved[:chunk].tolist() == [after] * chunk
        assert moved[chunk + 1 :].tolist() == [before] * (WINDOW - 1 - chunk)


@torch.no_grad()
@pytest.mark.parametrize("encoder", WHOLE_PASSAGES)
def test_a_long_passage_is_read_in_equal_windows(models: dict[str, RefragModel], encoder: str) -> None:
    model, chunks = models[encoder], passage(38 * K)
    windows = [model.encode(part) for part in chunks.split([13, 13, 12])]
    close(model.encode(chunks), torch.cat(windows), atol=1e-4, rtol=1e-4)


def test_windows_are_as_few_and_as_equal_as_can_be() -> None:
    for chunks in range(1, 40):
        whole = torch.arange(1, 2 * chunks + 1).view(1, chunks, 2)
        for padded in (False, True):
            windows, places = cut_windows(whole, 8, padded)
            lengths = (windows[..., 0] != PAD).sum(1)
            assert len(lengths) == -(-chunks // 8) and lengths.max() <= 8
            assert (lengths[:-1] == lengths[0]).all() and int(lengths.sum()) == chunks
            rows = windows.flatten(0, 1)
            assert torch.equal(rows if places is None else rows[places[0]], whole[0])


@torch.no_grad()
def test_keeping_chunks_as_text_leaves_the_vectors_of_the_others(model: RefragModel) -> None:
    chunks = passage(30)
    keep = torch.tensor([False, True, False, False, True, False, False, True])
    projected = model.project(model.encode(chunks))
    prompt = [Text([5, 6]), Chunks(chunks, keep), Text([7])]
    embeds = model.embed([[Chunks(passage(9, 3))], prompt], "right").embeds[1]
    places = [2, 7, 8, 13, 14]
    close(embeds[places], projected[~keep], atol=1e-4, rtol=1e-4)
    stored = [Text([5, 6]), Chunks(chunks, keep, model.encode(chunks)), Text([7])]
    close(model([prompt]), model([stored]), atol=1e-4, rtol=1e-4)
    whole = [Text([5, 6]), Chunks(chunks, torch.ones(8, dtype=torch.bool)), Text([7])]
    close(model([whole]), model.decoder(torch.tensor([plain_tokens(whole)])).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_saved_model_has_the_same_encoder(model: RefragModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    loaded = RefragModel.load(tmp_path)
    chunks = passage(130)
    close(loaded.encode(chunks), model.encode(chunks), atol=0, rtol=0)
    assert type(loaded.encoder) is type(model.encoder)
    assert loaded.encoder_digest() == model.encoder_digest() == loaded.encoder.digest()


def test_the_window_is_part_of_what_made_the_vectors(models: dict[str, RefragModel]) -> None:
    encoder = models["layers, passage"].encoder
    wide = encoder.digest()
    encoder.window_chunks = 8
    narrow = encoder.digest()
    encoder.window_chunks = 16
    assert narrow != wide == encoder.digest()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_all_layers_of_a_decoder_are_the_decoder(name: str) -> None:
    decoder = family(name)
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    encoder = LayersEncoder(
        first_layers(decoder, 2), embedding_weight(decoder), float(embedding_size(decoder)), K, "concat", True, 16
    )
    states = encoder.states(ids, torch.nn.functional.embedding(ids, encoder.decoder_embeddings), WindowLayout())
    close(states, decoder.get_decoder()(input_ids=ids).last_hidden_state, atol=1e-4, rtol=1e-3)
    first = first_layers(decoder, 1)
    assert first.config.num_hidden_layers == 1 and decoder.config.num_hidden_layers == 2
    for parameter in first.parameters():
        parameter.add_(1.0)
    close(encoder.states(ids, torch.nn.functional.embedding(ids, encoder.decoder_embeddings), WindowLayout()), states)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"source": "decoder"}, r"source is decoder: say how many of its layers"),
        ({"source": "decoder", "layers": 1, "train_token_table": True}, r"train_token_table is True .*own embeddings"),
        ({"source": "decoder", "layers": 1, "pooling": "cls"}, r"pooling is cls"),
        ({"window": "passage", "pooling": "cls"}, r"pooling is cls"),
        ({"window": "passage", "window_tokens": 7}, r"window_tokens is 7, less than two chunks of 4 tokens"),
        ({"window": "page"}, r"'chunk' or 'passage'"),
    ],
)
def test_what_does_not_fit_together_is_refused(encoder: dict[str, Any], message: str) -> None:
    values = Project(ROOT).recipe("tiny").model_dump(mode="json")
    own = values["encoder"] | ({"config": {}, "train_token_table": False} if "source" in encoder else {})
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(values | {"encoder": own | encoder})


@pytest.mark.parametrize(
    ("encoder", "changes", "message"),
    [
        ("layers", {"layers": 3}, r"encoder\.layers is 3, but the decoder has 2 layers"),
        ("passage", {"window_tokens": 128}, r"read 128 tokens at once, but its BertModel has 64 .*window_tokens"),
        ("chunk", {"chunk_size": 128}, r"read 128 tokens at once, but its BertModel has 64 .*chunk_size"),
        ("layers, passage", {"window_tokens": 4096}, r"its LlamaModel has 2048 positions"),
    ],
)
def test_more_than_the_weights_have_is_refused(encoder: str, changes: dict[str, Any], message: str) -> None:
    recipe = recipe_with(encoder)
    recipe = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update=changes)})
    with pytest.raises(RecipeError, match=message):
        RefragModel.create(recipe, Project(ROOT).recipe_path("tiny").parent)


@torch.no_grad()
def test_fused_layers_read_windows_of_passages(models: dict[str, RefragModel]) -> None:
    encoder = models["passage"].encoder.eval()
    together = torch.stack([passage(24 * K, seed) for seed in range(5)])
    close(encoder(together, False, FusedLayers(encoder)), encoder(together, False), atol=1e-4, rtol=1e-4)
