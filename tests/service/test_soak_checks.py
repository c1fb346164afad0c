"""The checks of benchmarks/service_soak.py and service_load.py can fail, and say what of."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
WHOLE = "completion 5"


@pytest.fixture(scope="module")
def benchmarks():
    """Imports a module of the benchmarks, which are not installed."""
    sys.path.append(BENCHMARKS)  # last: it has a coverage.py
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(BENCHMARKS)


class Alone:
    """A service that says what it is told to."""

    def __init__(self, say):
        self.say = say

    def post(self, path, json):
        return Answer(path, self.say(json["model"], json))


class Answer:
    def __init__(self, path, text):
        self.path, self.text = path, text

    def raise_for_status(self):
        pass

    def json(self):
        chat = self.path.endswith("chat/completions")
        told = {"message": {"content": self.text}} if chat else {"text": self.text}
        return {"choices": [{"index": 0, **told}]}


@pytest.fixture
def book(benchmarks):
    found = benchmarks("soak_crowd").Book()
    found.record(Alone(lambda model, body: f"{model} says so"), ["base", "t0", "t1"])
    return found


def case(book, name):
    return next(case for case in book.cases if case.name == name)


def test_an_answer_of_another_tenant_is_told_from_ones_own(book):
    asked = case(book, WHOLE)
    assert book.fault({"t0"}, asked, ("t0 says so",), True) is None
    assert book.fault({"t0"}, asked, ("t1 says so",), True) == "cross-tenant: the answer of t1"
    assert book.fault({"t0"}, asked, ("base says so",), True) == "cross-tenant: the answer of base"
    assert book.fault({"t0"}, asked, ("t0 says",), True) == "an answer that nobody gives"
    assert book.fault({"t0", "t1"}, asked, ("t1 says so",), True) is None  # while it is turned over
    assert book.fault({None}, asked, ("t0 says so",), True) == "cross-tenant: the answer of t0"


def test_a_piece_of_an_answer_has_to_be_its_beginning(book):
    asked = case(book, WHOLE)
    assert book.fault({"t0"}, asked, ("t0 s",), False) is None
    assert book.fault({"t0"}, asked, ("t1 s",), False) == "cross-tenant: the answer of t1"
    assert book.fault({"t0"}, asked, ("says",), False) == "an answer that nobody gives"


def test_tenants_that_say_the_same_prove_nothing(benchmarks):
    with pytest.raises(RuntimeError, match="say the same to"):
        benchmarks("soak_crowd").Book().record(
            Alone(lambda model, body: "t0" if model == "t0" else "same"), ["base", "t0", "t1"]
        )


def test_what_a_name_stands_for_is_certain_before_and_after_a_change_only(benchmarks):
    standing = benchmarks("soak_crowd").Standing("old")
    with standing.watched() as before:
        standing.turn("new")
        with standing.watched() as during:
            standing.settle("new")
            with standing.watched() as after:
                pass
    assert (before, during, after) == ({"old", "new"}, {"old", "new"}, {"new"})


def test_errors_are_held_to_their_shape(benchmarks):
    ledger = benchmarks("soak_ledger").Ledger()
    fine = {"error": {"message": "m", "type": "t", "param": None, "code": None}}
    ledger.check_refusal("a", 404, {}, fine)
    ledger.check_refusal("a", 503, {"retry-after": "1"}, fine)
    assert not ledger.faults
    ledger.check_refusal("a", 503, {}, fine)
    ledger.check_refusal("a", 404, {}, {"detail": "no"})
    ledger.check_refusal("a", 500, {}, fine)
    assert set(ledger.faults) == {"no Retry-After", "an error in another shape", "status 500"}


def found(**changes):
    rest = {"held": {}, "unlike": {}, "over_budget": 0, "files": 15, "threads": 16, "evictions": {"room": 9}}
    base = {
        "faults": {},
        "memory": {"rss_mib": {"growth": 0.01}},
        "rests": [rest, rest | changes.pop("rest", {})],
        "log": {"tracebacks": 0, "secrets": 0},
        "exit_status": 0,
    }
    return base | changes


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"faults": {"status 500": 1}}, {"no fault of any kind", "no 500"}),
        ({"faults": {"cross-tenant": 1}}, {"no fault of any kind", "no token of another tenant"}),
        ({"memory": {"rss_mib": {"growth": 0.031}}}, {"memory is flat"}),
        ({"memory": {}}, {"memory is flat"}),
        ({"rest": {"files": 18}}, {"open files are flat"}),
        ({"rest": {"threads": 21}}, {"threads are flat"}),
        ({"rest": {"held": {"pins": 1}}}, {"nothing is held at rest"}),
        ({"rest": {"unlike": {"/metrics": 1}}}, {"all counts of bytes agree"}),
        ({"rest": {"evictions": {}}}, {"deltas had to make room"}),
        ({"log": {"tracebacks": 0, "secrets": 1}}, {"no traceback and no secret in the log"}),
        ({"exit_status": 1}, {"it ended in order"}),
        ({}, set()),
    ],
)
def test_every_verdict_of_a_soak_can_fail(benchmarks, changes, broken):
    verdicts = benchmarks("service_soak").verdicts(found(**changes))
    assert {name for name, kept in verdicts.items() if not kept} == broken


def test_what_is_held_and_counted_differently_is_seen_at_rest(benchmarks):
    engine = {"running": 0, "waiting": 0, "kv_blocks_used": 2, "failed_steps": 0, "kv_blocks": 9}
    engine |= {"preemptions": 0, "answer_tokens": 5}
    store = {"pins": 0, "reserved_bytes": 0, "waiting": 0, "resident_bytes": 7, "byte_budget": 5, "loads": 1}
    status = {"engine": engine, "deltas": store | {"evictions": {}}}
    deltas = {"data": [{"pins": 0, "resident_bytes": 7}], "resident_bytes": 7}
    scraped = {"vllm:kv_cache_usage_perc": 0.0, "deltakeeper_delta_resident_bytes memory": 8}
    rest = benchmarks("service_soak").at_rest(status, deltas, scraped)
    assert rest["held"] == {"kv_blocks_used": 2} and rest["unlike"]["/metrics"] == 8 and rest["over_budget"] == 2


def test_the_cheap_client_counts_events_that_are_cut_in_two(benchmarks):
    client = benchmarks("load_client")

    async def read(parts):
        answer = client.Answer("t", 0.0)
        reader = client._Reader(answer, asyncio.get_running_loop().create_future(), True)
        for part in parts:
            reader.data_received(part)
        reader.connection_lost(None)
        return answer

    text = b'HTTP/1.1 200 OK\r\n\r\ndata: {"a"}\n\ndata: {"b"}\n\ndata: {"usage":{"completion_tokens":2}}\n\n'
    whole = text + b"data: [DONE]\n\n"
    for cut in range(20, len(whole)):
        answer = asyncio.run(read([whole[:cut], whole[cut:]]))
        assert (answer.status, answer.tokens, len(answer.events)) == (200, 2, 2), cut
    assert asyncio.run(read([text])).status == 0  # it broke off


def test_percentiles_and_shares(benchmarks):
    assert benchmarks("load_latency").percentiles([float(i) for i in range(1, 101)]) == {
        "p50": 50,
        "p95": 95,
        "p99": 99,
    }
    windows = [
        {"flooded": kind, "quiet_tokens_s": rate} for kind, rate in ((False, 10), (True, 9), (False, 10), (True, 7))
    ]
    shares = benchmarks("load_fairness").share(windows)
    assert shares == {"ratios": [0.9, 0.7], "median_ratio": 0.8, "kept": False}
