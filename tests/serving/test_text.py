"""Incremental decoding and stop strings."""

import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from refrag_platform.serving.text import REPLACEMENT, Detokenizer, StopStrings, token_texts
from tests.conftest import ROOT

TEXTS = [
    "Plain words, and more of them.",
    "Grüße aus São Tomé",
    "Ελληνικά 日本語 हिन्दी",
    "🇵🇪 and 👩‍👩‍👧 in one line",
    " leading  spaces\n\n",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(Path(ROOT / "models/tiny/tokenizer.json")))


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_none_is_broken(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = Detokenizer(lambda part: decode(tokenizer, part))
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == decode(tokenizer, ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_is_not_sent(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("Peru 🇵", add_special_tokens=False)
    assert decode(tokenizer, ids[:-1]).endswith(REPLACEMENT)
    stream = Detokenizer(lambda part: decode(tokenizer, part))
    assert "".join(stream.push(token) for token in ids[:-1]) == "Peru "


def test_random_tokens_decode_as_a_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(len(tokenizer)) for _ in range(40)]
        stream = Detokenizer(lambda part: decode(tokenizer, part))
        sent = "".join(stream.push(token) for token in ids)
        whole = decode(tokenizer, ids)
        assert whole.startswith(sent) and set(whole[len(sent) :]) <= {REPLACEMENT}


def test_each_token_s_text_is_decoded_once_special_or_not(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [str(tokenizer.decode([token], skip_special_tokens=False)) for token in range(len(tokenizer))]
    asked: list[list[int]] = []
    decode_ids = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **more: asked.append(ids) or decode_ids(ids, **more))
    texts = token_texts(tokenizer)
    assert [[texts(token) for token in range(len(tokenizer))] for _ in range(2)] == [expected] * 2
    assert len(asked) == len(tokenizer) and set(tokenizer.all_special_tokens) <= set(expected)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_stop_string_is_found_however_it_is_cut(cut: int) -> None:
    text = "one two END three"
    stops = StopStrings(["END", "never"])
    sent = ""
    for begin in range(0, len(text), cut):
        sent += stops.push(text[begin : begin + cut])
        if stops.stopped:
            break
    assert (sent, stops.stopped) == ("one two ", True)


def test_text_that_only_begins_a_stop_string_is_sent_in_the_end() -> None:
    stops = StopStrings(["END"])
    assert stops.push("the EN") == "the "
    assert stops.flush() == "EN"
    assert not stops.stopped


def test_the_earliest_of_several_stop_strings_counts() -> None:
    stops = StopStrings(["later", "soon"])
    assert stops.push("a soon b later") == "a "
