"""The gate: open on loopback until the first key, closed to everything unknown, and quotas under threads."""

from __future__ import annotations

import threading
import time
from collections import Counter
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from tenancy_cases import Clock, open_place, state_place  # noqa: F401

from deltakeeper.service.access import Principal
from deltakeeper.service.errors import BadRequest, TooManyRequests, Unauthorized, Unavailable
from deltakeeper.service.tenancy import metering
from deltakeeper.service.tenancy.database import StateError, open_state
from deltakeeper.service.tenancy.gate import LOOK_SECONDS, STALE_SECONDS, StateGate
from deltakeeper.service.tenancy.keys import KeyRing
from deltakeeper.service.tenancy.metering import Meter
from deltakeeper.service.tenancy.quotas import Limits, Quota, QuotaBook

ONE, TWO = Principal("key-1", "tenant"), Principal("key-2", "tenant")


@pytest.fixture
def gate(state):
    made = StateGate(state, open_until_first_key=True)
    yield made
    made.close()


def meter_of(clock, **scopes):
    """A meter with limits by `scope_subject`; `each` stands for `*`."""
    meter = Meter(clock)
    names = {name: name.split("_") for name in scopes}
    meter.set_limits({(scope, {"each": "*"}.get(on, on)): scopes[name] for name, (scope, on) in names.items()})
    return meter


def within(seconds, holds):
    """Whether something comes to hold in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_everybody_is_let_in_until_the_first_key(gate):
    for header in (None, "Bearer EMPTY", "nonsense"):
        found = gate.identify(header)
        assert found == Principal(None, "open") and found.manages and found.may_use("anything")
    made = gate.keys.create("first", "tenant", ["a"])
    gate.refresh()
    with pytest.raises(Unauthorized):
        gate.identify(None)
    assert gate.identify(f"Bearer {made.secret}") == Principal(made.key.id, "tenant", frozenset({"a"}))
    gate.keys.revoke(made.key.id)
    gate.refresh()
    assert gate.has_keys and not gate.is_open
    with pytest.raises(Unauthorized, match="is revoked"):  # that no key is left opens nothing again
        gate.identify(f"Bearer {made.secret}")


def test_elsewhere_nobody_is_let_in_without_a_key(state):
    closed = StateGate(state)
    assert not closed.has_keys
    with pytest.raises(Unauthorized):
        closed.identify(None)
    closed.close()


def test_only_a_bearer_with_a_whole_key_is_known(gate):
    admin = gate.keys.create("admin", "admin").secret
    tenant = gate.keys.create("tenant", "tenant", ["a"]).secret
    gate.refresh()
    assert gate.identify(f"Bearer {admin}").manages
    assert gate.identify(f"bearer   {tenant} ").manages is False
    assert gate.identify(f"Bearer {tenant}").may_use("b") is False
    refused = (None, "", "Bearer", admin, f"Basic {admin}", f"Bearer {admin}x", f"Bearer {admin[3:]}", "Bearer dk-")
    for header in (*refused, "Bearer dk-" + "x" * 10**6, "Bearer dk-é\udcff"):
        with pytest.raises(Unauthorized) as told:
            gate.identify(header)
        assert admin not in str(told.value) and told.value.code == "invalid_api_key"


def test_a_key_expires_while_the_service_runs(state):
    now = Clock(1000.0)
    gate = StateGate(state, now=now)
    secret = gate.keys.create("short", "tenant", None, expires_in=60).secret
    gate.refresh()
    assert gate.identify(f"Bearer {secret}").role == "tenant"
    now.at = 1060.0
    with pytest.raises(Unauthorized, match="is expired"):
        gate.identify(f"Bearer {secret}")
    gate.close()


def test_what_another_process_writes_holds_soon(place):
    """Two states of one place, as the service and `deltakeeper keys` have them."""
    ours, theirs = open_state(place), open_state(place)
    gate, ring = StateGate(ours), KeyRing(theirs)
    made = ring.create("made elsewhere", "admin")
    assert within(20 * LOOK_SECONDS, lambda: gate.has_keys)
    assert gate.identify(f"Bearer {made.secret}").manages
    QuotaBook(theirs).set(Quota("key", made.key.id, Limits(concurrent=1)))
    ring.revoke(made.key.id)

    def is_refused():
        try:
            gate.identify(f"Bearer {made.secret}")
        except Unauthorized:
            return True
        return False

    assert within(20 * LOOK_SECONDS, is_refused)
    principal = Principal(made.key.id, "admin")
    with gate.admit(principal, "a", 1), pytest.raises(TooManyRequests), gate.admit(principal, "a", 1):
        pass
    gate.close()
    ours.close()
    theirs.close()


def test_a_state_that_cannot_be_read_is_told_once_and_so_is_its_return(tmp_path, monkeypatch, caplog):
    caplog.set_level("WARNING", "deltakeeper.service")
    opened = open_state(tmp_path / "state.db")
    tries = []

    def revision(state):
        tries.append(1)
        if len(tries) in (2, 3):
            raise StateError("The database is gone.")
        return 1

    monkeypatch.setattr(type(opened), "revision", revision)
    gate = StateGate(opened)
    assert within(20 * LOOK_SECONDS, lambda: len(tries) > 4)
    gate.close()
    opened.close()
    lost, found = (record.getMessage() for record in caplog.records)
    assert lost.endswith("nobody is let in: The database is gone.") and found.endswith("can be read again")


def test_when_the_state_is_lost_known_keys_work_for_a_minute_and_nobody_after_it(tmp_path, monkeypatch):
    opened, clock = open_state(tmp_path / "state.db"), Clock()
    gate = StateGate(opened, clock=clock, open_until_first_key=True)
    header = f"Bearer {gate.keys.create('one', 'admin').secret}"
    gate.refresh()
    gate.close()  # its thread, so that the test alone moves time
    with opened.writing() as connection:
        connection.execute(text("ALTER TABLE deltakeeper_keys RENAME TO lost"))
    clock.at += STALE_SECONDS
    with pytest.raises(StateError):
        gate.refresh()
    assert gate.identify(header).manages
    clock.at += 0.1
    with pytest.raises(Unavailable, match="cannot be checked") as told:
        gate.identify(header)
    assert told.value.retry_after and "state.db" not in str(told.value)
    with opened.writing() as connection:
        connection.execute(text("ALTER TABLE lost RENAME TO deltakeeper_keys"))
    gate.refresh()
    assert gate.identify(header).manages
    with opened.writing() as connection:
        connection.execute(text("DELETE FROM deltakeeper_keys"))
    with pytest.raises(StateError, match="has lost its keys"):  # and loopback is not open again
        gate.refresh()
    assert not gate.is_open
    opened.close()


def test_the_thread_lives_through_a_failure_and_ends(state):
    gate = StateGate(state)
    with state.writing() as connection:
        connection.execute(text("ALTER TABLE deltakeeper_keys RENAME TO lost"))
    time.sleep(3 * LOOK_SECONDS)
    with state.writing() as connection:
        connection.execute(text("ALTER TABLE lost RENAME TO deltakeeper_keys"))
    KeyRing(state).create("one", "admin")
    assert within(20 * LOOK_SECONDS, lambda: gate.has_keys)
    gate.close()
    assert not gate._thread.is_alive()


def test_each_limit_of_a_key_refuses_with_the_time_to_wait():
    clock = Clock()
    meter = meter_of(clock, key_each=Limits(requests_per_minute=2, tokens_per_minute=100, concurrent=1))
    meter.count("key-1")
    first = meter.admit("key-1", "a", 10)
    for refused in (meter.admit, partial(meter.check, answers=1)):
        with pytest.raises(TooManyRequests, match=r"1 answers at a time; ask again in 1 s\.") as told:
            refused("key-1", "a", 10)
    assert told.value.retry_after == 1.0
    with first:
        first.spend(60)
    with pytest.raises(TooManyRequests, match=r"100 tokens a minute; ask again in 6 s\.") as told:
        meter.admit("key-1", "a", 40)
    assert told.value.retry_after == pytest.approx(6.0)
    with meter.admit("key-1", "a", 30):
        pass
    meter.count("key-1")
    with pytest.raises(TooManyRequests, match=r"2 requests a minute; ask again in 30 s\."):
        meter.count("key-1")
    meter.count("key-2")  # each key has its own
    with meter.admit("key-2", "a", 10):
        pass


def test_what_a_quota_could_never_let_in_is_a_mistake_and_not_told_to_come_back():
    meter = meter_of(Clock(), key_each=Limits(tokens_per_minute=100, concurrent=2), model_a=Limits(concurrent=1))
    for key, tokens, answers, words in (
        ("key-1", 101, 1, "100 tokens a minute, and the prompt alone has more"),
        ("key-1", 1, 3, "2 answers at a time, and this request wants 3"),
        (None, 1, 2, "Model 'a' may be asked for 1 answers at a time"),
    ):
        with pytest.raises(BadRequest, match=words) as told:
            meter.admit(key, "a", tokens, answers)
        assert told.value.retry_after is None


def test_a_request_is_let_in_with_all_its_answers_or_charged_to_nobody():
    clock = Clock()
    meter = meter_of(clock, key_each=Limits(tokens_per_minute=100, concurrent=4), model_a=Limits(20, 90, 3))
    with meter.admit("key-1", "a", 40, 2):
        for _ in range(30):
            with pytest.raises(TooManyRequests, match="Model 'a'"):
                meter.admit("key-1", "a", 10, 2)
            with pytest.raises(TooManyRequests, match="This key"):
                meter.check("key-1", "a", 61, 1)
        with meter.admit("key-1", "a", 10, 1):
            pass
    assert [meter._accounts[name].slots.running for name in (("key", "key-1"), ("model", "a"))] == [{}, {}]
    left = [sum(bucket._levels.values()) for bucket in (meter._accounts["model", "a"].requests,)]
    assert left == pytest.approx([18])  # one a request, however many answers it wants
    with meter.admit("key-1", "a", 40, 3):  # 90 tokens together, which is all
        pass


def test_an_answer_that_runs_over_is_owed():
    clock = Clock()
    meter = meter_of(clock, key_each=Limits(tokens_per_minute=60))
    with meter.admit("key-1", "a", 10) as usage:
        for _ in range(110):
            usage.spend(1)  # never refused: what was begun is answered to its end
    clock.at += 60.5
    with pytest.raises(TooManyRequests):
        meter.admit("key-1", "a", 1)
    clock.at += 0.6
    with meter.admit("key-1", "a", 1):
        pass


def test_a_refused_request_is_charged_to_nobody():
    clock = Clock()
    meter = meter_of(clock, key_each=Limits(requests_per_minute=1), model_a=Limits(requests_per_minute=100))
    for _ in range(1000):
        try:
            meter.count("key-1")
            with meter.admit("key-1", "a", 1):
                pass
        except TooManyRequests:
            continue
    with meter.admit(None, "a", 1):  # without keys the model's quota holds all the same
        pass
    account = meter._accounts["model", "a"]
    assert account.requests is not None
    assert sum(account.requests._levels.values()) == pytest.approx(98)


def test_quotas_that_change_hold_at_once_and_forget_nothing():
    clock = Clock()
    meter = meter_of(clock, key_each=Limits(requests_per_minute=1, concurrent=2))
    meter.count("key-1")
    with meter.admit("key-1", "a", 1):
        meter.set_limits({("key", "key-1"): Limits(requests_per_minute=60, concurrent=1)})
        with pytest.raises(TooManyRequests, match="60 requests"):
            meter.count("key-1")
        clock.at += 2
        meter.count("key-1")
        with pytest.raises(TooManyRequests, match="1 answers at a time"):  # the first one still runs
            meter.admit("key-1", "a", 1)
        meter.set_limits({})
        for _ in range(100):
            with meter.admit("key-1", "a", 10**9):
                pass


def test_a_slot_is_given_back_once_whatever_happens():
    meter = meter_of(Clock(), key_each=Limits(concurrent=2))
    first, second = meter.admit("key-1", "a", 1), meter.admit("key-1", "a", 1)
    with pytest.raises(ZeroDivisionError), first:
        raise ZeroDivisionError
    with first:  # closed again by a caller that is not sure
        pass
    third = meter.admit("key-1", "a", 1)
    with pytest.raises(TooManyRequests):
        meter.admit("key-1", "a", 1)
    for usage in (second, third):
        with usage:
            pass


def test_names_without_end_take_no_memory_without_end(monkeypatch):
    monkeypatch.setattr(metering, "MOST_IDLE_ACCOUNTS", 64)
    clock = Clock()
    meter = meter_of(clock, model_each=Limits(requests_per_minute=1, concurrent=1))
    meter._prune_at = 64
    held = meter.admit(None, "held", 1)
    for number in range(5000):
        clock.at += 1
        with meter.admit(None, f"model {number}", 1):
            pass
        assert len(meter._accounts) <= 256
    with pytest.raises(TooManyRequests):
        meter.admit(None, "held", 1)
    with held:
        pass


@given(st.lists(st.tuples(st.sampled_from(["k1", "k2"]), st.sampled_from("ab"), st.integers(0, 30)), max_size=60))
def test_what_is_let_in_fits_every_quota(asked):
    clock = Clock()
    limits = {"key": Limits(requests_per_minute=20, tokens_per_minute=200), "model": Limits(tokens_per_minute=300)}
    meter = meter_of(clock, key_each=limits["key"], model_each=limits["model"])
    requests, tokens = Counter(), Counter()
    for key, model, count in asked:
        try:
            meter.count(key)
            requests[key] += 1
            with meter.admit(key, model, count):
                tokens.update({key: count, model: count})
        except TooManyRequests:
            continue
    assert all(requests[key] <= 20 and tokens[key] <= 200 for key in ("k1", "k2"))
    assert all(tokens[model] <= 300 + 2 * 30 for model in "ab")  # above a share is owed, once for each key


def test_threads_never_pass_a_quota_together(gate):
    gate.quotas.set(Quota("key", "*", Limits(concurrent=3, requests_per_minute=200)))
    gate.quotas.set(Quota("model", "a", Limits(concurrent=4)))
    gate.refresh()
    lock, running, most, let_in, failures = threading.Lock(), Counter(), Counter(), Counter(), []

    def ask(principal):
        for _ in range(400):
            try:
                gate.count(principal)
                with gate.admit(principal, "a", 1) as usage:
                    with lock:
                        running.update({principal.key_id: 1, "all": 1})
                        for name in (principal.key_id, "all"):
                            most[name] = max(most[name], running[name])
                        let_in[principal.key_id] += 1
                    time.sleep(0.0002)
                    usage.spend(1)
                    with lock:
                        running.subtract({principal.key_id: 1, "all": 1})
            except TooManyRequests:
                continue
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=ask, args=(principal,)) for principal in (ONE, TWO) for _ in range(4)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    flowed = (time.monotonic() - started) * 200 / 60 + 1
    assert failures == []
    assert most["key-1"] <= 3 and most["key-2"] <= 3 and 1 <= most["all"] <= 4
    assert 0 < let_in["key-1"] <= 200 + flowed and 0 < let_in["key-2"] <= 200 + flowed
    for _ in range(2):  # nothing is left taken
        assert gate._meter._accounts["model", "a"].slots.running == {}


def test_a_flooding_key_leaves_another_its_part_of_a_shared_model():
    """Two keys, one model of 1200 tokens a minute: one asks for its half, the other for ten times as much."""
    clock = Clock(0.0)
    meter = meter_of(clock, model_a=Limits(tokens_per_minute=1200, requests_per_minute=600))
    served = Counter()
    for tick in range(6000):  # 100 ms each
        clock.at = tick / 10
        names = ["flood"] * 10 + (["quiet"] if tick % 10 == 5 else [])
        for name in names:
            try:
                with meter.admit(name, "a", 6) as usage:
                    usage.spend(4)  # a second's half: 10 tokens
                served[name] += 1
            except TooManyRequests:
                continue
    assert served["quiet"] >= 0.9 * 600
    assert 0.9 * 600 <= served["flood"] <= 1.1 * 600 + 120


def test_the_gate_costs_a_request_little(gate):
    """Four quotas, a hundred keys that share a model; a request and 20 tokens, well below what a pass takes."""
    secrets = [gate.keys.create(f"key {number}", "tenant", ["a"]).secret for number in range(100)]
    gate.quotas.set(Quota("key", "*", Limits(10**6, 10**9, 1000)))
    gate.quotas.set(Quota("model", "*", Limits(10**6, 10**9, 1000)))
    gate.refresh()
    spent = []
    for secret in secrets * 3:
        began = time.thread_time()
        principal = gate.identify(f"Bearer {secret}")
        gate.count(principal)
        gate.check(principal, "a", 1)
        with gate.admit(principal, "a", 100) as usage:
            for _ in range(20):
                usage.spend(1)
        spent.append(time.thread_time() - began)
    assert sorted(spent)[len(spent) // 2] < 2e-3
