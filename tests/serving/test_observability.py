"""What operators see: figures with vLLM's meanings, spans, a log for machines; and that dashboard and alerts ask for
figures that there are."""

import json
import logging
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from refrag_platform.errors import RefragError
from refrag_platform.serving.logs import JsonLines
from refrag_platform.serving.tracing import resource, tracer_of
from tests.conftest import ROOT
from tests.processes import wait_for
from tests.serving.conftest import Server

QUESTION = "What is the capital of Peru?"
DEPLOY = ROOT / "deploy"


def ask(url: str, question: str = QUESTION, headers: dict[str, str] | None = None, **extra: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": question}], "max_tokens": 4, **extra}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def figures(url: str) -> dict[str, float]:
    """Every sample by its name and labels."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_an_answer_s_figures_are_those_of_its_own_body(server: Server) -> None:
    with server() as url:
        told = [ask(url, n=2).json(), ask(url, n=2).json()]
        seen = figures(url)
    usages, fields = [one["usage"] for one in told], [one["refrag"] for one in told]
    tokens = sum(usage["completion_tokens"] for usage in usages)
    assert seen["refrag_prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
    assert seen["refrag_prompt_tokens_uncompressed_total"] == sum(field["plain_prompt_tokens"] for field in fields)
    assert seen["refrag_prompt_tokens_total"] < seen["refrag_prompt_tokens_uncompressed_total"]
    assert seen["refrag_generation_tokens_total"] == tokens
    assert seen["refrag_prefix_cache_queries_total"] == seen["refrag_prompt_tokens_total"]
    assert seen["refrag_prefix_cache_hits_total"] == sum(field["positions_reused"] for field in fields) > 0
    assert seen["refrag_time_to_first_token_seconds_count"] == 2
    # Each of two choices of both answers begins with a token that comes after none.
    assert seen["refrag_inter_token_latency_seconds_count"] == tokens - 4
    first = sum(field["time_to_first_token_ms"] / 1000 + field["seconds"]["retrieve"] for field in fields)
    assert seen["refrag_time_to_first_token_seconds_sum"] >= first
    assert seen["refrag_requests_total /v1/chat/completions POST 200"] == 2
    assert seen["refrag_prefix_cache_bytes"] > 0 == seen["refrag_refusals_total"]


def test_a_stream_counts_as_a_whole_answer_does_and_a_wrong_request_for_none(server: Server) -> None:
    with server() as url:
        ask(url, stream=True)
        ask(url, n=0)
        # A stream's client has its last byte before the server has ended it.
        wait_for(lambda: figures(url)["refrag_time_to_first_token_seconds_count"] == 1, 20)
        seen = figures(url)
    assert seen["refrag_requests_total /v1/chat/completions POST 400"] == 1


def test_the_decoder_s_state_is_told_while_it_writes(server: Server, held_decoder: threading.Event) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "logprobs": True, "stream": True}
    with server() as url:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            next(answer.iter_text())
            during = figures(url)
            held_decoder.set()
        wait_for(lambda: figures(url)["refrag_num_requests_running"] == 0, 20)
        after = figures(url)
    assert (during["refrag_ready"], during["refrag_num_requests_running"]) == (1, 1)
    assert (during["refrag_num_requests_waiting"], after["refrag_kv_cache_bytes"]) == (0, 0)
    assert 0 < during["refrag_kv_cache_usage_perc"] < 0.2 and during["refrag_kv_cache_bytes"] > 0


def test_without_a_model_there_are_no_figures_of_one(server: Server) -> None:
    with server(loaded=False) as url:
        seen = figures(url)
    assert seen["refrag_ready"] == 0 and "refrag_num_requests_running" not in seen


def asked_for(text: str) -> set[str]:
    return set(re.findall(r"\brefrag_[a-z_]+", text))


@pytest.fixture(scope="module")
def exported(server: Server) -> set[str]:
    """Names of all samples that the service really exports."""
    with server() as url:
        ask(url)
        return {name.split(" ")[0] for name in figures(url)}


def test_the_dashboard_asks_for_figures_that_there_are(exported: set[str]) -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(expressions) > 8 and all(asked_for(one) for one in expressions)
    assert asked_for(" ".join(expressions)) <= exported
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_alerts_ask_for_figures_that_there_are_and_say_what_to_do(exported: set[str]) -> None:
    rules = [
        rule for group in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
    ]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 4
    for rule in rules:
        assert asked_for(rule["expr"]) <= exported
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert {"summary", "description"} <= set(rule["annotations"])
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    assert scraped["rule_files"] == ["alerts.yaml"]
    assert {job["job_name"] for job in scraped["scrape_configs"]} == {"refrag"}


def test_the_autoscaler_asks_for_a_figure_that_there_is_by_the_name_that_the_adapter_gives(exported: set[str]) -> None:
    kubernetes = DEPLOY / "kubernetes"
    resources = yaml.safe_load_all((kubernetes / "base" / "service.yaml").read_text())
    (scaler,) = (resource["spec"] for resource in resources if resource["kind"] == "HorizontalPodAutoscaler")
    (rule,) = yaml.safe_load((kubernetes / "monitoring" / "adapter.yaml").read_text())["rules"]
    names = {metric["pods"]["metric"]["name"] for metric in scaler["metrics"]}
    assert names == asked_for(rule["seriesQuery"]) <= exported
    scraped = yaml.safe_load((kubernetes / "monitoring" / "prometheus.yaml").read_text())
    (job,) = scraped["scrape_configs"]
    assert (job["job_name"], scraped["rule_files"]) == ("refrag", ["alerts.yaml"])
    assert set(rule["resources"]["overrides"]) <= {one.get("target_label") for one in job["relabel_configs"]}


def test_the_documents_name_every_figure(exported: set[str]) -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported if not name.endswith("_created")}
    assert bases == set(re.findall(r"^\| `(refrag_[a-z_]+)`", page, re.MULTILINE))


def test_spans_tell_each_part_of_an_answer(server: Server) -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = trace.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with server(tracer=provider.get_tracer("test")) as url:
        for extra in ({}, {"stream": True}):
            memory.clear()
            ask(url, headers={"traceparent": parent, "X-Request-Id": "mine"}, **extra)
            wait_for(lambda: len(memory.get_finished_spans()) == 6, 20)
            *parts, whole = memory.get_finished_spans()
            assert [span.name for span in parts] == ["retrieve", "select", "project", "prefill", "decode"]
            assert all(span.parent.span_id == whole.context.span_id for span in parts)
            assert f"{whole.context.trace_id:032x}-{whole.parent.span_id:016x}" in parent
            moments = [(span.start_time, span.end_time) for span in parts]
            assert moments == sorted(moments) and all(begun <= ended for begun, ended in moments)
            assert whole.start_time <= moments[0][0] and moments[-1][1] <= whole.end_time
            assert whole.name == "chat tiny" and whole.attributes["refrag.request_id"] == "mine"
            assert whole.attributes["gen_ai.usage.output_tokens"] > 0
            assert "Peru" not in str([span.to_json() for span in (*parts, whole)])


def test_spans_go_nowhere_unless_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracer_of({}) is None
    monkeypatch.setattr("refrag_platform.serving.tracing.EXPORTER", "opentelemetry.exporter.not_installed")
    with pytest.raises(RefragError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT is set.*pip install opentelemetry-exporter"):
        tracer_of({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"})


def test_spans_are_of_the_service_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resource().attributes["service.name"] == "refrag"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=answers,team=search")
    assert (resource().attributes["service.name"], resource().attributes["team"]) == ("answers", "search")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "asked")
    assert resource().attributes["service.name"] == "asked"


def test_the_log_for_machines_has_ids_and_no_prompt(
    server: Server, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG, "refrag")
    with server() as url:
        ask(url, "a secret question", headers={"X-Request-Id": "mine"})
        ask(url, "another secret question", headers={"X-Request-Id": "wrong"}, share_kept=7)
    lines = [JsonLines().format(record) for record in caplog.records]
    told = [json.loads(line) for line in lines]
    ended = {one["request_id"]: (one["status"], one["endpoint"], one["method"]) for one in told if "status" in one}
    assert ended == {"mine": (200, "/v1/chat/completions", "POST"), "wrong": (400, "/v1/chat/completions", "POST")}
    assert all({"time", "level", "logger", "message"} <= set(one) for one in told)
    assert "secret" not in "".join(lines)
