"""How the machine is used: what a GPU's graph captures is what was warmed up."""

from typing import Any

import pytest
import torch
from transformers.utils import import_utils

from refrag_platform.bench.shapes import named_shape
from refrag_platform.model.decoder import UNPADDED_CHUNKS, attention


@torch.inference_mode()
def test_no_mask_is_made_for_chunks_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = named_shape("tiny", torch.device("cpu"), torch.float32).encoder
    ids = torch.arange(64 * 4).view(64, 4)
    plain = encoder(ids, padded=False)
    masks: list[Any] = []
    layer = encoder.backbone.encoder.layer[0]
    layer.register_forward_pre_hook(lambda _layer, given, named: masks.append((given[1:], named)), with_kwargs=True)
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    with attention(encoder.backbone.config, UNPADDED_CHUNKS):
        torch.testing.assert_close(encoder(ids, padded=False), plain)
    assert not any(isinstance(value, torch.Tensor) for given, named in masks for value in (*given, *named.values()))
    assert encoder.backbone.config._attn_implementation == "sdpa"
