"""Traces: a span a request below its caller's, one for each answer, and nothing that anybody wrote."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from service_cases import PROMPT, FakeGate, opened_services, served, wait_until

from deltakeeper.service.access import Principal

sdk = pytest.importorskip("opentelemetry.sdk.trace.export")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402

from deltakeeper.service.traces import Traces, open_traces  # noqa: E402

TRACE, PARENT = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
CALLER = {"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01", "X-Request-Id": "mine"}


@pytest.fixture
def spans():
    return InMemorySpanExporter()


@pytest.fixture
def live(service_folder, spans):
    traces = Traces(sdk.SimpleSpanProcessor(spans), "1.0")
    gate = FakeGate({"all": Principal("k-all", "tenant")})
    with opened_services(service_folder, gate=gate, traces=traces) as services, served(services) as server:
        yield server
    traces.close()


def finished(spans, count):
    """The spans that have ended, once there are so many: a request's ends after its answer was sent."""
    wait_until(lambda: len(spans.get_finished_spans()) >= count)
    assert len(spans.get_finished_spans()) == count
    return spans.get_finished_spans()


@pytest.mark.parametrize("stream", [False, True])
def test_answers_stand_below_their_request_and_that_below_its_caller(live, spans, stream):
    body = {"model": "signs", "prompt": PROMPT, "max_tokens": 3, "n": 2, "ignore_eos": True, "stream": stream}
    with live.client("all") as client:
        answered = client.post("/v1/completions", json=body, headers=CALLER)
    assert answered.status_code == 200 and answered.headers["x-request-id"] == "mine"
    *answers, request = finished(spans, 3)
    assert request.name == "POST /v1/completions" and request.kind.name == "SERVER"
    assert (request.context.trace_id, request.parent.span_id) == (TRACE, PARENT)
    assert request.attributes["http.response.status_code"] == 200 and request.status.status_code.name == "UNSET"
    assert request.attributes["gen_ai.request.id"] == "mine" and request.attributes["deltakeeper.key_id"] == "k-all"
    for answer in answers:
        assert answer.name == "llm_request" and answer.parent.span_id == request.context.span_id
        seen = answer.attributes
        assert (seen["gen_ai.request.model"], seen["gen_ai.response.finish_reasons"]) == ("signs", ("length",))
        assert (seen["gen_ai.usage.input_tokens"], seen["gen_ai.usage.output_tokens"]) == (4, 3)
        waited, first, whole = (
            seen[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "time_to_first_token", "e2e")
        )
        assert 0 <= waited <= first <= whole
        assert request.start_time <= answer.start_time < answer.events[0].timestamp <= answer.end_time
        assert answer.end_time - answer.start_time == pytest.approx(whole * 1e9, abs=1e3)
    assert PROMPT.split()[0] not in "".join(span.to_json() for span in (*answers, request))


def test_what_is_refused_is_traced_and_probes_are_not(live, spans):
    with live.client() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models?key=dk-secret").status_code == 401
        assert client.get("/v1/secret-path").status_code == 404
    known, unknown = finished(spans, 2)
    assert known.attributes["http.response.status_code"] == 401 and known.parent is None
    assert unknown.name == "GET"
    assert "secret" not in known.to_json() + unknown.to_json()


def test_a_failure_is_an_error(live, spans, monkeypatch):
    monkeypatch.setattr(type(live.services.store), "stats", lambda self: 1 / 0)
    with live.client("all") as client:
        assert client.get("/v1/models").status_code == 500
    (span,) = finished(spans, 1)
    assert span.status.status_code.name == "ERROR" and span.attributes["http.response.status_code"] == 500


def test_a_collector_gets_them_by_otlp(service_folder, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, self.headers["Content-Type"], body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        traces = open_traces(f"http://127.0.0.1:{collector.server_port}/v1/traces", "1.0")
        try:
            with (
                opened_services(service_folder, traces=traces) as services,
                served(services) as live,
                live.client() as c,
            ):
                c.post("/v1/completions", json={"model": "base", "prompt": PROMPT, "max_tokens": 2})
        finally:
            traces.close()  # sends what is left
            collector.shutdown()
            thread.join()
    ((path, kind, body),) = got
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "ours"
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert names == ["llm_request", "POST /v1/completions"]
