"""An encoder's fused layers against the backbone as transformers writes it."""

from typing import Literal

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from refrag_platform.errors import RefragError
from refrag_platform.model.backbone import strip_backbone
from refrag_platform.model.encoder import BertEncoder
from refrag_platform.model.fused import FusedLayers, linear_gelu

Pooling = Literal["cls", "concat", "mean"]


def encoder(kind: str = "roberta", pooling: Pooling = "cls", **changes: object) -> BertEncoder:
    """A small encoder with random weights throughout."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, **{**sizes, "max_position_embeddings": 64, **changes})
    torch.manual_seed(0)
    backbone = strip_backbone(AutoModel.from_config(config))
    made = BertEncoder(backbone, torch.randn(100, 32), torch.randn(100, 24), 8, pooling, True, False).eval()
    for module in made.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    return made


def ids(chunks: int) -> torch.Tensor:
    return torch.randint(0, 100, (chunks, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("pooling", ["cls", "concat", "mean"])
@pytest.mark.parametrize("chunks", [5, 32])
@torch.no_grad()
def test_vectors_are_those_of_the_backbone(kind: str, pooling: Pooling, chunks: int) -> None:
    plain = encoder(kind, pooling)
    torch.testing.assert_close(
        plain(ids(chunks), padded=False, layers=FusedLayers(plain)), plain(ids(chunks), padded=False)
    )


def test_padding_is_left_to_the_backbone() -> None:
    plain, tokens = encoder(), ids(4)
    tokens[3, 5:] = -1
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens, layers=FusedLayers(plain)), plain(tokens))


@pytest.mark.gpu
@torch.no_grad()
def test_half_precision_is_as_near_to_the_exact_vectors_as_the_backbone_is() -> None:
    exact = encoder().cuda()
    wanted = exact(ids(256).cuda(), padded=False)
    half = encoder().cuda().bfloat16()
    apart = [
        (half(ids(256).cuda(), padded=False, layers=layers).float() - wanted).pow(2).mean().sqrt()
        for layers in (None, FusedLayers(half), FusedLayers(half, compile=True))
    ]
    assert max(apart[1:]) < 1.1 * apart[0]


def test_the_operator_keeps_shape_and_type() -> None:
    states, weight, bias = torch.randn(2, 3, 4), torch.randn(6, 4), torch.randn(6)
    torch.library.opcheck(linear_gelu, (states, weight, bias), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"is_decoder": True}),
        ("mpnet", {}),
        ("roformer", {"embedding_size": 32}),
        ("distilbert", {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2}),
    ],
)
def test_other_backbones_are_refused(kind: str, changes: dict[str, object]) -> None:
    with pytest.raises(RefragError, match="can't be fused"):
        FusedLayers(encoder(kind, **changes))
