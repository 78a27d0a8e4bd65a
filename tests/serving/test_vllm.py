"""The engine on vLLM, which is not installed where these tests run.

The `vllm` below stands in for its interface alone: that vLLM takes these calls, and answers so, is not shown here. What
is shown: which vectors it is handed, and what is made of its tokens.
"""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM

from refrag_platform.decoding.settings import Sampling
from refrag_platform.decoding.stream import Stream
from refrag_platform.decoding.vllm import _tell
from refrag_platform.errors import RefragError
from refrag_platform.project import Project
from refrag_platform.serving.api import create_app
from refrag_platform.serving.contract import Message
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.settings import ApiSettings
from tests.processes import wait_for

QUESTION = [Message("user", "What is the capital of Peru?")]


class StandIn:
    """Reads embedded prompts with transformers, from the folder that it is given."""

    errored = False

    def __init__(self, arguments: SimpleNamespace) -> None:
        self.arguments, self.prompts, self.parameters = arguments, [], []
        self.decoder = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
        self.aborted = threading.Event()

    async def generate(
        self, prompt: dict[str, Any], parameters: SimpleNamespace, request_id: str
    ) -> AsyncIterator[Any]:
        self.prompts.append(prompt["prompt_embeds"])
        self.parameters.append(parameters)
        inputs, ended = prompt["prompt_embeds"][None], None
        try:
            for made in range(1, parameters.max_tokens + 1):
                with torch.inference_mode():
                    token = int(self.decoder(inputs_embeds=inputs).logits[0, -1].argmax())
                    inputs = torch.cat([inputs, self.decoder.get_input_embeddings()(torch.tensor([[token]]))], 1)
                ended = "length" if made == parameters.max_tokens else None
                ended = "stop" if token in parameters.stop_token_ids else ended
                yield SimpleNamespace(
                    outputs=[SimpleNamespace(index=0, token_ids=[token], logprobs=None, finish_reason=ended)]
                )
                if ended:
                    return
                await asyncio.sleep(0)
        finally:
            if not ended:
                self.aborted.set()

    def shutdown(self) -> None:
        self.errored = True


@pytest.fixture
def on_vllm(packaged_project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    module, sampling = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    sampling.RequestOutputKind = SimpleNamespace(DELTA="delta")
    module.sampling_params, module.SamplingParams, module.AsyncEngineArgs = sampling, SimpleNamespace, SimpleNamespace
    module.AsyncLLMEngine = SimpleNamespace(from_engine_args=StandIn)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)
    engine = Engine.load(packaged_project, "tiny", vllm=True)
    yield engine
    engine.close()


def stand_in(engine: Engine) -> StandIn:
    return engine._scheduler._engine


def test_it_is_handed_the_very_vectors_that_our_own_decoder_reads(
    engine: Engine, on_vllm: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    submit = engine._scheduler.submit
    monkeypatch.setattr(
        engine._scheduler, "submit", lambda prompt, *rest: read.append(prompt.embeds) or submit(prompt, *rest)
    )
    answers = []
    for one in (engine, on_vllm):
        generation = one.start(QUESTION, one.retrieve("Peru", 2), Sampling(12), 0.25)
        answers.append(("".join(generation), generation.finish_reason, generation.usage.completion_tokens))
    (handed,) = stand_in(on_vllm).prompts
    assert torch.equal(handed, read[0].cpu()) and handed.device.type == "cpu"
    assert answers[0] == answers[1]


def test_prompts_are_taken_as_vectors_and_none_is_kept(on_vllm: Engine) -> None:
    arguments = stand_in(on_vllm).arguments
    assert arguments.enable_prompt_embeds is True and arguments.enable_prefix_caching is False
    assert arguments.max_model_len == on_vllm.max_positions and arguments.dtype == "float32"
    "".join(on_vllm.start(QUESTION, (), Sampling(3, temperature=0.5, seed=7)))
    (parameters,) = stand_in(on_vllm).parameters
    assert (parameters.max_tokens, parameters.temperature, parameters.seed) == (3, 0.5, 7)
    assert "vLLM" in on_vllm.memory() and on_vllm.alive


def test_clients_cannot_send_vectors(on_vllm: Engine) -> None:
    app = create_app("tiny", ApiSettings())
    app.state.engine = on_vllm
    client = TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1))
    for path, body in {
        "completions": {"prompt": "Lima"},
        "chat/completions": {"messages": [{"role": "user", "content": "Lima"}]},
        "responses": {"input": "Lima"},
    }.items():
        answer = client.post(f"/v1/{path}", json=body | {"model": "tiny", "prompt_embeds": "AAAA"})
        assert answer.status_code == 400 and "prompt_embeds" in answer.text, path
    assert not stand_in(on_vllm).prompts


def test_answers_are_not_held_to_a_schema(on_vllm: Engine) -> None:
    app = create_app("tiny", ApiSettings())
    app.state.engine = on_vllm
    client = TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Lima"}]}
    answer = client.post("/v1/chat/completions", json=body | {"response_format": {"type": "json_object"}})
    assert answer.status_code == 400 and "REFRAG_VLLM" in answer.json()["error"]["message"]
    assert not stand_in(on_vllm).prompts


def test_an_answer_that_nobody_waits_for_is_given_up(on_vllm: Engine) -> None:
    generation = on_vllm.start(QUESTION, (), Sampling(400))
    next(iter(generation.deltas()))
    generation.close()
    wait_for(stand_in(on_vllm).aborted.is_set, 20)
    wait_for(lambda: on_vllm.decoder_load().running == 0, 20)


def test_an_answer_that_is_being_written_fails_when_the_decoder_is_closed(on_vllm: Engine) -> None:
    deltas = iter(on_vllm.start(QUESTION, (), Sampling(400)).deltas())
    next(deltas)
    on_vllm.close()
    with pytest.raises(RefragError, match="the decoder has been shut down"):
        list(deltas)


def test_choices_and_log_probabilities_keep_their_places() -> None:
    stream = Stream(2, lambda: None)
    logprobs = [{5: SimpleNamespace(logprob=-0.9), 7: SimpleNamespace(logprob=-0.5), 6: SimpleNamespace(logprob=-2.0)}]
    _tell(SimpleNamespace(index=1, token_ids=[5], logprobs=logprobs, finish_reason=None), 2, frozenset({2}), stream)
    _tell(SimpleNamespace(index=0, token_ids=[2], logprobs=[{}], finish_reason="stop"), 2, frozenset({2}), stream)
    _tell(SimpleNamespace(index=1, token_ids=[], logprobs=[], finish_reason="length"), 2, frozenset({2}), stream)
    first, stopped, ended = stream
    assert (first.choice, first.token.id, first.token.logprob) == (1, 5, -0.9)
    assert first.token.top == ((7, -0.5), (5, -0.9))
    assert (stopped.choice, stopped.token, stopped.finish_reason) == (0, None, "stop")
    assert (ended.choice, ended.finish_reason) == (1, "length")
    with pytest.raises(RefragError, match="'abort'"):
        _tell(SimpleNamespace(index=0, token_ids=[], logprobs=[], finish_reason="abort"), None, frozenset(), stream)


def test_without_vllm_the_message_says_what_to_do(packaged_project: Project) -> None:
    with pytest.raises(RefragError, match="pip install vllm"):
        Engine.load(packaged_project, "tiny", vllm=True)


def test_the_switch_is_read_from_the_environment() -> None:
    assert ApiSettings.from_environment({"REFRAG_VLLM": "1"}).vllm
    assert not ApiSettings.from_environment({}).vllm
    with pytest.raises(RefragError, match="REFRAG_VLLM is 'yes'"):
        ApiSettings.from_environment({"REFRAG_VLLM": "yes"})
