"""Metrics of a running engine, as a scraper reads them; and the dashboard, which must ask for series that there are."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
from admission_parts import running, write_policy
from prometheus_client.parser import text_string_to_metric_families
from service_cases import FakeGate
from starlette.testclient import TestClient

from deltakeeper.engine import Request
from deltakeeper.engine.stream import Stream
from deltakeeper.service.access import Principal
from deltakeeper.service.app import build_app
from deltakeeper.service.metrics import ServiceMetrics, metrics_router
from deltakeeper.service.metrics.top_tenants import OTHER, TopTenants
from deltakeeper.service.running import Services

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana.json"
OURS = re.compile(r"\b(?:vllm:|deltakeeper_)[a-z0-9_]+")


@pytest.fixture
def parts(world, tmp_path):
    policy = write_policy(tmp_path, codecs=["bitdelta"])
    with running(world, world / "deltas", policy, tmp_path / "log.jsonl") as parts:
        parts.metrics = ServiceMetrics(parts.engine, parts.store, "base", parts.log, tenants=2)
        yield parts


def ask(parts, tenant, tokens=4):
    stream = parts.engine.submit(Request((5, 6, 7), tenant, tokens, ignore_eos=True))
    answer = stream.result(30)
    if stream.times.first_token:
        parts.metrics.first_token(tenant or "base", stream.times.first_token - stream.times.submitted)
    parts.metrics.answered(tenant or "base", stream, len(answer.tokens))
    parts.metrics.prompt_done([len(answer.tokens)], tokens)
    return answer


def read(text):
    """Samples by name and labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def scrape(parts):
    return read(parts.metrics.render().decode())


def value(samples, name, **labels):
    found = [v for (n, own), v in samples.items() if n == name and labels.items() <= dict(own).items()]
    assert len(found) == 1, (name, labels, len(found))
    return found[0]


def test_what_routers_read_has_the_names_and_labels_of_vllm(parts):
    ask(parts, None)
    ask(parts, "signs", 5)
    samples = scrape(parts)
    base = {"model_name": "base", "engine": "0"}
    assert value(samples, "vllm:num_requests_running", **base) == 0
    assert value(samples, "vllm:num_requests_waiting", **base) == 0
    assert value(samples, "vllm:kv_cache_usage_perc", **base) == 0
    assert value(samples, "vllm:prompt_tokens_total", **base) == 6
    assert value(samples, "vllm:generation_tokens_total", **base) == 9
    assert value(samples, "vllm:request_success_total", finished_reason="length", **base) == 2
    assert value(samples, "vllm:num_preemptions_total", **base) == 0
    assert value(samples, "vllm:prefix_cache_queries_total", **base) >= 0
    for name in (
        "time_to_first_token_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
    ):
        assert value(samples, f"vllm:{name}_count", **base) == 2
        assert 0 <= value(samples, f"vllm:{name}_sum", **base) < 60
    [info] = [dict(labels) for name, labels in samples if name == "vllm:lora_requests_info"]
    assert set(info) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"} and int(info["max_lora"]) > 1
    assert info["running_lora_adapters"] == ""  # idle ones are not named, as with vLLM


def test_what_routers_and_dashboards_of_vllm_read_of_cache_and_sizes_is_there(parts):
    ask(parts, "signs", 5)
    stream = parts.engine.submit(Request(tuple(range(5, 45)), "signs", 4, ignore_eos=True))
    again = parts.engine.submit(Request(tuple(range(5, 45)), "signs", 4, ignore_eos=True))
    for one in (stream, again):
        parts.metrics.answered("signs", one, len(one.result(30).tokens))
    cached = stream.cached_tokens + again.cached_tokens
    parts.metrics.prompt_done([4, 2], 7)
    samples, blocks = scrape(parts), parts.engine.stats().kv_blocks
    cache = {"block_size": "16", "num_gpu_blocks": str(blocks), "engine": "0"}
    assert value(samples, "vllm:cache_config_info", **cache) == 1 and blocks > 0
    for name, count, total in (
        ("request_prompt_tokens", 3, 3 + 40 + 40),
        ("request_prefill_kv_computed_tokens", 3, 83 - cached),
        ("request_generation_tokens", 3, 5 + 4 + 4),
        ("request_max_num_generation_tokens", 2, 5 + 4),
        ("request_params_n", 2, 1 + 2),
        ("request_params_max_tokens", 3, 5 + 7 + 7),
    ):
        assert value(samples, f"vllm:{name}_count", model_name="base", engine="0") == count, name
        assert value(samples, f"vllm:{name}_sum", model_name="base", engine="0") == total, name
    edges = {dict(labels)["le"] for name, labels in samples if name == "vllm:request_prompt_tokens_bucket"}
    assert {"1.0", "2.0", "5.0", "10.0", "20.0", "+Inf"} <= edges
    assert max(float(edge) for edge in edges - {"+Inf"}) <= parts.engine.context
    ends = {dict(labels)["finished_reason"] for name, labels in samples if name == "vllm:request_success_total"}
    assert ends == {"stop", "length", "abort", "error"}  # each is there before it first happens


def test_parts_of_the_time_add_up(parts):
    ask(parts, "signs", 8)
    samples = scrape(parts)

    def total(name):
        return value(samples, f"vllm:{name}_sum", model_name="base")

    first = total("request_queue_time_seconds") + total("request_prefill_time_seconds")
    assert first == pytest.approx(total("time_to_first_token_seconds"), abs=1e-6)
    inference = total("request_prefill_time_seconds") + total("request_decode_time_seconds")
    assert total("request_inference_time_seconds") == pytest.approx(inference, abs=1e-6)
    assert first + total("request_decode_time_seconds") == pytest.approx(total("e2e_request_latency_seconds"), abs=1e-6)
    mean = total("request_decode_time_seconds") / 7
    assert total("request_time_per_output_token_seconds") == pytest.approx(mean, abs=1e-6)


def test_a_delta_that_answers_is_named_while_it_does(parts):
    assert ask(parts, "signs").tokens
    lease = parts.store.acquire("signs")
    [info] = [dict(labels) for name, labels in scrape(parts) if name == "vllm:lora_requests_info"]
    assert info["running_lora_adapters"] == "signs"
    lease.release()


def test_passes_and_loads_are_counted_once_however_often_somebody_scrapes(parts):
    ask(parts, "signs", 6)
    samples = [scrape(parts) for _ in range(3)]
    for name in ("vllm:iteration_tokens_total_count", "deltakeeper_delta_load_seconds_count"):
        assert len({value(one, name) for one in samples}) == 1
    assert value(samples[0], "deltakeeper_delta_load_seconds_count") == 1
    passes = parts.engine.stats()
    assert value(samples[0], "vllm:iteration_tokens_total_count") == passes.steps
    assert value(samples[0], "vllm:iteration_tokens_total_sum") == passes.computed_tokens
    parts.store.unload("signs")
    ask(parts, "signs")
    assert value(scrape(parts), "deltakeeper_delta_load_seconds_count") == 2


def test_residency_evictions_failures_and_decisions_are_there(parts):
    ask(parts, "signs")
    assert ask(parts, "ranks").finish_reason == "error"  # policy keeps it out
    samples = scrape(parts)
    stats = parts.store.stats()
    assert value(samples, "deltakeeper_delta_resident_bytes", tier="memory") == stats.resident_bytes > 0
    assert value(samples, "deltakeeper_delta_budget_bytes") == stats.byte_budget
    assert value(samples, "deltakeeper_delta_loaded", delta="signs", tier="memory") == 1
    others = len(parts.store.names()) - 2  # there are two places
    assert value(samples, "deltakeeper_delta_loaded", delta=OTHER, tier="disk") == others > 0
    assert value(samples, "deltakeeper_delta_load_failures_total", reason="Refused") == 1
    assert value(samples, "deltakeeper_delta_evictions_total", reason="room") == 0
    assert value(samples, "deltakeeper_admission_decisions_total", verdict="admitted") == 1
    assert value(samples, "deltakeeper_admission_decisions_total", verdict="refused") == 1
    assert value(samples, "deltakeeper_admission_decisions_total", verdict="quarantined") == 0
    assert value(samples, "vllm:request_success_total", finished_reason="error") == 1
    assert value(samples, "deltakeeper_tenant_requests_total", tenant="ranks", finished_reason="error") == 1
    assert value(samples, "deltakeeper_tenant_tokens_total", tenant="ranks", kind="prompt") == 0
    parts.store.unload("signs")
    parts.engine.submit(Request((5,), None, 1)).result(30)
    assert value(scrape(parts), "deltakeeper_delta_evictions_total", reason="unloaded") == 1
    assert value(samples, "deltakeeper_kernel_backend_info") == 1


def test_rejections_gaps_and_clients_that_left_are_counted(parts):
    parts.metrics.rejected("quota")
    parts.metrics.rejected("quota")
    parts.metrics.token_after("signs", 0.03)
    left = Stream("gone", 3)
    parts.metrics.answered("signs", left, 0)
    samples = scrape(parts)
    assert value(samples, "vllm:admission_rejections_total", reason="quota", model_name="base") == 2
    assert value(samples, "vllm:inter_token_latency_seconds_sum") == pytest.approx(0.03)
    assert value(samples, "vllm:request_success_total", finished_reason="abort") == 1
    assert not any(name.endswith("_created") for name, _ in samples)


# -- how many series --


def streamed(tokens=3):
    stream = Stream("one", tokens)
    stream.times.admitted = stream.times.first_token = stream.times.submitted
    stream.end("stop")
    return stream


def test_a_thousand_tenants_have_as_many_series_as_there_are_places(parts):
    for i in range(1000):
        parts.metrics.first_token(f"t{i}", 0.1)
        parts.metrics.answered(f"t{i}", streamed(), 5)
        parts.metrics.prompt_done([5], 8)
    samples = scrape(parts)
    tenants = {dict(labels)["tenant"] for _, labels in samples if "tenant" in dict(labels)}
    assert tenants == {"t0", "t1", OTHER}
    assert value(samples, "deltakeeper_tenant_tokens_total", tenant=OTHER, kind="generation") == 998 * 5
    assert len(samples) < 400


def test_a_tenant_that_grows_busy_takes_a_place_and_no_counter_falls(parts):
    for name in ("a", "b", "c"):
        parts.metrics.answered(name, streamed(), 100)
    before = value(scrape(parts), "deltakeeper_tenant_tokens_total", tenant=OTHER, kind="generation")
    assert before == 100
    for _ in range(4):
        parts.metrics.answered("c", streamed(), 100)
    samples = scrape(parts)
    tenants = {dict(labels)["tenant"] for _, labels in samples if "tenant" in dict(labels)}
    assert len(tenants) == 3 and {"c", OTHER} < tenants
    other = value(samples, "deltakeeper_tenant_tokens_total", tenant=OTHER, kind="generation")
    own = value(samples, "deltakeeper_tenant_tokens_total", tenant="c", kind="generation")
    assert other >= before and other + own == 500


def test_places_fade_and_are_not_fought_over():
    dropped, now = [], [0.0]
    top = TopTenants(1, dropped.append, half_life=10.0, clock=lambda: now[0])
    assert top.label("a", 100) == "a"
    assert top.label("b", 150) == OTHER and dropped == []  # half as busy again is not enough
    now[0] = 20.0
    assert top.label("b", 1) == OTHER  # both faded alike
    now[0] = 100.0
    assert top.label("b", 50) == "b" and dropped == ["a"] and top.labels() == {"b"}
    for i in range(1000):
        top.label(f"t{i}", 0.1)
    assert len(top._scores) <= 17 and top.labels() == {"b"}


def test_many_threads_count_right(parts):
    def count():
        for i in range(200):
            parts.metrics.answered(f"t{i % 7}", streamed(), 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(scrape(parts), "vllm:request_success_total", finished_reason="stop") == 800


# -- the route and the dashboard --


def test_metrics_are_for_monitors_and_administrators_unless_somebody_says_otherwise(parts):
    keys = {
        "admin": Principal("a", "admin"),
        "tenant": Principal("t", "tenant"),
        "monitor": Principal("m", "monitor", frozenset()),
    }

    def client(kind, metrics):
        services = Services(
            engine=parts.engine,
            store=parts.store,
            base=parts.base,
            base_name="base",
            gate=FakeGate(keys),
            deltas=parts.deltas,
            metrics=metrics,
        )
        return TestClient(build_app(services, [metrics_router(kind)]))

    guarded = client("measure", parts.metrics)
    assert guarded.get("/metrics").status_code == 401
    assert guarded.get("/metrics", headers={"Authorization": "Bearer tenant"}).status_code == 403
    monitor = {"Authorization": "Bearer monitor"}
    assert guarded.get("/metrics", headers=monitor).status_code == 200
    assert guarded.get("/v1/models", headers=monitor).status_code == 403  # a scraper's key is good for nothing else
    answer = guarded.get("/metrics", headers={"Authorization": "Bearer admin"})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert read(answer.text)
    assert client("public", parts.metrics).get("/metrics").status_code == 200
    assert client("public", None).get("/metrics").status_code == 404


def test_the_dashboard_asks_for_series_that_there_are_and_shows_nearly_all(parts):
    board = json.loads(DASHBOARD.read_text())
    asked = {name for panel in board["panels"] for t in panel.get("targets", ()) for name in OURS.findall(t["expr"])}
    ask(parts, "signs")
    parts.metrics.rejected("quota")
    parts.metrics.token_after("signs", 0.01)
    parts.store.register("gone", parts.deltas / "gone")
    ask(parts, "gone")
    there = {name for name, _ in scrape(parts)}
    assert asked <= there, asked - there
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in there if OURS.match(name)}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    unshown = {"deltakeeper_kernel_backend_info", "deltakeeper_delta_pins", "deltakeeper_delta_loads_waiting"}
    assert families - shown == unshown | {"vllm:lora_requests_info", "vllm:num_preemptions_total"}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) and all(
        panel.get("description") for panel in board["panels"] if "targets" in panel
    )
