"""The table by which a BERT-type encoder reads a decoder's token ids, so that nothing is tokenized twice."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from refrag_platform.model.encoder import embedding_weight


def token_table(
    backbone: PreTrainedModel,
    encoder_tokenizer: PreTrainedTokenizerFast | None,
    decoder_tokenizer: PreTrainedTokenizerFast,
    vocabulary: int,
    generator: torch.Generator,
) -> Tensor:
    """The encoder's table over decoder ids, [vocabulary, h].

    Each row is the mean of the encoder's own word vectors of the decoder token's text; tokens without text
    (special ones, byte fragments), and all of them when there is no encoder tokenizer, get small random rows.
    """
    words = embedding_weight(backbone).detach().float()
    table = torch.randn(vocabulary, words.shape[1], generator=generator) * words.std()
    if encoder_tokenizer is None:
        return table
    known = min(vocabulary, len(decoder_tokenizer))
    texts = [str(decoder_tokenizer.decode([token])) for token in range(known)]
    usable = [number for number, text in enumerate(texts) if re.search(r"\S", text) and "\ufffd" not in text]
    pieces = encoder_tokenizer([texts[number] for number in usable], add_special_tokens=False)["input_ids"]
    for number, ids in zip(usable, pieces, strict=True):
        if ids:
            table[number] = words[ids].mean(0)
    return table
