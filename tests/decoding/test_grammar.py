"""Which tokens a JSON schema lets follow."""

import json
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from refrag_platform.decoding.grammar import Grammars, Matcher, SchemaError
from refrag_platform.decoding.sampling import Sampler, Token, pick_batch
from refrag_platform.decoding.settings import Sampling, Schema
from refrag_platform.model.refrag import RefragModel
from tests.decoding.conftest import create

LIST = Schema('{"type": "array", "items": {"enum": [7]}, "minItems": 1, "maxItems": 2}')


@pytest.fixture(scope="module")
def tiny() -> RefragModel:
    return create("tiny")


@pytest.fixture(scope="module")
def grammars(tiny: RefragModel) -> Grammars:
    return Grammars(tiny.tokenizer)


def allowed(tiny: RefragModel, matcher: Matcher) -> set[str]:
    return {tiny.tokenizer.decode([token]) for token in matcher.allowed().tolist()}


def test_an_answer_goes_on_to_json_that_is_whole(tiny: RefragModel, grammars: Grammars) -> None:
    def token(text: str) -> int:
        return int(tiny.tokenizer.convert_tokens_to_ids(text))

    matcher = grammars.matcher(LIST).copy()
    assert "[" in allowed(tiny, matcher) and all(one.startswith("[") for one in allowed(tiny, matcher))
    for text in ("[", "7"):
        matcher.advance(token(text))
    assert {one[0] for one in allowed(tiny, matcher)} == {",", "]"}
    ended = matcher.copy()
    ended.advance(token("]"))
    assert ended.whole and allowed(tiny, ended) == {tiny.tokenizer.eos_token}
    assert not matcher.whole and {one[0] for one in allowed(tiny, matcher)} == {",", "]"}


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.5, "top_p": 0.9}, {"top_logprobs": 2}])
def test_a_row_with_a_grammar_changes_none_beside_it(
    tiny: RefragModel, grammars: Grammars, drawn: dict[str, float]
) -> None:
    logits = torch.randn(12, 2, len(tiny.tokenizer), generator=torch.Generator().manual_seed(0))
    sampling = Sampling(12, seed=3, **drawn)
    held, free, alone = (Sampler(sampling, matcher=one) for one in (grammars.matcher(LIST).copy(), None, None))
    ids = []
    for step in logits:
        if held.whole:
            break
        first, second = pick_batch([held, free], step)
        assert isinstance(first, Token) and second == alone.pick(step[1])
        ids.append(first.id)
        if first.logprob is not None:
            assert first.logprob == pytest.approx(float(step[0].log_softmax(-1)[first.id]))
    assert held.whole and tiny.tokenizer.decode(ids) in ("[7]", "[7,7]")


def test_a_grammar_that_comes_to_no_end_fails_by_its_name(grammars: Grammars) -> None:
    endless = grammars.matcher(
        Schema('{"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"}')
    ).copy()
    endless.advance(int(endless.allowed()[0]))
    with pytest.raises(SchemaError, match="make the schema simpler"):
        for _ in range(20):
            endless.advance(int(endless.allowed()[0]))
    assert not endless.whole


def test_new_schemas_are_tried_one_after_the_other_and_leave_no_process(grammars: Grammars) -> None:
    # Each takes a processor for 0.1 s at least.
    slow = [Schema(f'{{"type": "integer", "multipleOf": {50_000 + number}}}') for number in (21, 23, 33, 47)]
    this = psutil.Process()
    others, most = set(this.children()), 0
    with ThreadPoolExecutor(len(slow)) as pool:
        asked = [pool.submit(grammars.matcher, schema) for schema in slow]
        while not all(one.done() for one in asked):
            most = max(most, len(set(this.children()) - others))
    assert all("1" in grammars._tokenizer.decode(one.result().allowed()) for one in asked)
    assert most == 1 and set(this.children()) <= others


def test_what_llguidance_gives_up_is_told_without_its_calls(grammars: Grammars) -> None:
    with pytest.raises(SchemaError, match=r"no grammar can be made of the schema: .+; change") as raised:
        grammars.matcher(Schema('{"type": "array", "items": {"enum": [1]}, "maxItems": 70000}'))
    assert "backtrace" not in str(raised.value)


def test_a_schema_that_would_overflow_a_thread_s_stack_is_refused(grammars: Grammars) -> None:
    def nested(levels: int) -> Schema:
        parts = {str(n): {"anyOf": [{"const": n}, {"$ref": f"#/$defs/{n + 1}"}]} for n in range(levels)}
        return Schema(json.dumps({"$ref": "#/$defs/0", "$defs": parts | {str(levels): {"type": "string"}}}))

    assert len(grammars.matcher(nested(50)).allowed())
    with pytest.raises(SchemaError, match="nested too deep"):
        grammars.matcher(nested(900))
