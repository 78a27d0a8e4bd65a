"""OpenTelemetry spans of each answer and its parts: retrieve, select, project, prefill, decode.

They are made once the answer has ended, from the times that it kept: nothing is traced while it is written. Names are
those of OpenTelemetry's conventions for generative AI; prompts and answers are in none of them.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.requests import Request

from refrag_platform.errors import RefragError
from refrag_platform.serving.errors import request_id

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.trace import Tracer

    from refrag_platform.serving.generation import Generation, Refusal

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
EXPORTER = "opentelemetry.exporter.otlp.proto.http"


def tracer_of(environment: Mapping[str, str]) -> Tracer | None:
    """A tracer that sends spans where OTEL_EXPORTER_OTLP_ENDPOINT says, by OTLP over HTTP; None without it.

    Raises:
        RefragError: the packages are not installed.
    """
    named = next((name for name in ENDPOINTS if environment.get(name)), None)
    if named is None:
        return None
    try:
        exporter = importlib.import_module(f"{EXPORTER}.trace_exporter").OTLPSpanExporter()
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise RefragError(
            f"{named} is set, but there is nothing to send spans with; unset it, or "
            "`pip install opentelemetry-exporter-otlp-proto-http`"
        ) from None
    # A provider of its own, for BentoML has one.
    provider = TracerProvider(resource=resource())
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider.get_tracer("refrag_platform.serving")


def resource() -> Resource:
    """Whose the spans are: `refrag`, if OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES name no other service."""
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource

    named = Resource({SERVICE_NAME: "refrag"}).merge(OTELResourceDetector().detect())
    return Resource.create().merge(named)


def trace_answer(
    tracer: Tracer, request: Request, model: str, generation: Generation | Refusal, arrived: float
) -> None:
    """The spans of an answer that has ended; under the client's own, if it sent `traceparent`.

    Args: arrived: when its request did, in seconds of time.monotonic.
    """
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind, set_span_in_context

    now, usage = time.monotonic(), generation.usage
    since_epoch = time.time() - now

    def stamp(seconds: float) -> int:
        return int((since_epoch + seconds) * 1e9)

    facts = {
        "gen_ai.request.model": model,
        "gen_ai.usage.input_tokens": usage.prompt_positions,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.response.finish_reasons": [generation.finish_reason or "given_up"],
        "http.route": request.scope["route"].path,
        "refrag.request_id": request_id(request.scope) or "",
        "refrag.uncompressed_tokens": usage.plain_prompt_tokens,
        "refrag.positions_reused": usage.positions_reused,
        "refrag.chunks": usage.chunks,
        "refrag.chunks_expanded": usage.chunks_expanded,
        "refrag.answered": generation.sources.answered,
    }
    whole = tracer.start_span(
        f"chat {model}",
        context=extract(dict(request.headers)),
        kind=SpanKind.SERVER,
        attributes=facts,
        start_time=stamp(arrived),
    )
    inside = set_span_in_context(whole)
    parts = dict(generation.parts)
    drawn = [moment for times in generation.token_times for moment in times]
    if drawn:
        parts["decode"] = (min(drawn), max(drawn))
    for name, (begun, ended) in sorted(parts.items(), key=lambda part: part[1]):
        tracer.start_span(name, context=inside, start_time=stamp(begun)).end(stamp(ended))
    whole.end(stamp(now))
