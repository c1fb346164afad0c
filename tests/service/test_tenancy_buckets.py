"""Shared allowances: never more than was set, never less than a fair share, nothing lost, and honest waiting times."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.service.tenancy.buckets import MINUTE, SharedBucket
from deltakeeper.service.tenancy.slots import CLAIM_SECONDS, GAP_SECONDS, RETRY_SECONDS, Slots

SECONDS = st.floats(0, 200, allow_nan=False)
STEPS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 40), SECONDS), max_size=60)


@given(st.integers(1, 500), STEPS)
def test_no_stretch_of_time_gives_more_than_the_allowance(allowance, steps):
    """In every window, not only from the start: what is given is at most a minute's worth and what flowed in.

    A cost above a holder's share may be owed, by less than the cost, once for each holder.
    """
    bucket, now, given_at = SharedBucket(allowance, 0.0), 0.0, []
    for holder, cost, pause in steps:
        now += pause
        cost = min(cost, allowance)
        if not bucket.wait(holder, cost, now):
            bucket.take(holder, cost, now)
            given_at.append((now, cost))
    for first in range(len(given_at)):
        for last in range(first, len(given_at)):
            taken = sum(cost for _, cost in given_at[first : last + 1])
            flowed = allowance + (given_at[last][0] - given_at[first][0]) * allowance / MINUTE
            assert taken <= flowed + 4 * min(40, allowance) + 1e-3


@given(st.integers(40, 500), st.lists(st.tuples(st.integers(1, 40), SECONDS), max_size=60))
def test_one_holder_alone_has_the_plain_token_bucket(allowance, steps):
    bucket, level, now = SharedBucket(allowance, 0.0), float(allowance), 0.0
    for cost, pause in steps:
        now += pause
        level = min(float(allowance), level + pause * allowance / MINUTE)
        wait = bucket.wait("a", cost, now)
        assert wait == pytest.approx(max(0.0, cost - level) * MINUTE / allowance, abs=1e-4)
        if not wait:
            bucket.take("a", cost, now)
            level -= cost


@given(st.integers(1, 500), STEPS, st.integers(1, 40))
def test_who_comes_back_when_told_is_served(allowance, steps, cost):
    """A cost above the share needs another turn if the share has grown meanwhile, since others have gone."""
    bucket, now = SharedBucket(allowance, 0.0), 0.0
    for holder, charge, pause in steps:
        now += pause
        bucket.take(holder, charge, now)
    for turn in range(5):
        wait = bucket.wait("a", cost, now)
        now += wait
        if not wait:
            break
        assert turn == 0 or cost > allowance / 4
    assert wait == 0.0


@given(st.integers(1, 500), STEPS, st.lists(st.integers(1, 500), max_size=5))
def test_whatever_happens_no_more_is_kept_than_the_allowance(allowance, steps, sizes):
    bucket, now = SharedBucket(allowance, 0.0), 0.0
    for number, (holder, charge, pause) in enumerate(steps):
        now += pause
        bucket.take(holder, charge, now)
        if sizes and number % 7 == 3:
            bucket.resize(sizes[number % len(sizes)], now)
        held = sum(bucket._levels.values()) + bucket._spare
        assert held <= bucket.per_minute + 1e-6
        assert bucket._spare == 0 or not bucket._levels
    for _ in range(4000):  # what is owed is paid in the end, and all is full again
        now += MINUTE
        if bucket.is_full(now):
            break
    assert bucket.is_full(now)


def arrivals(rates, seconds):
    """Times and names of requests that come at random (Poisson), at so many a second each."""
    generator, events = random.Random(7), []
    for name, rate in rates.items():
        now = generator.expovariate(rate)
        while now < seconds:
            events.append((now, name))
            now += generator.expovariate(rate)
    return sorted(events)


def serve(bucket, events, holder_of=lambda name: name):
    """How many requests of each name are let in; one that is refused is lost, the worst case for the quiet one."""
    served = Counter()
    for now, name in events:
        if not bucket.wait(holder_of(name), 1, now):
            bucket.take(holder_of(name), 1, now)
            served[name] += 1
    return served


@pytest.mark.parametrize("flooders", [1, 3, 20])
def test_a_flood_at_ten_times_the_share_leaves_others_their_share(flooders):
    allowance, minutes = 600, 10
    share = allowance / MINUTE / (flooders + 1)  # requests a second
    rates = {"quiet": share} | {f"flood{number}": 10 * share for number in range(flooders)}
    events = arrivals(rates, minutes * MINUTE)
    asked = Counter(name for _, name in events)["quiet"]
    served = serve(SharedBucket(allowance, 0.0), events)
    assert served["quiet"] >= 0.9 * min(asked, share * minutes * MINUTE)
    assert allowance * minutes * 0.95 <= served.total() <= allowance * (minutes + 1)  # nothing wanted is left unused
    control = serve(SharedBucket(allowance, 0.0), events, lambda name: "all")  # one bucket for all
    assert control["quiet"] < 0.5 * asked


def test_what_one_does_not_use_another_one_may():
    bucket, served, now = SharedBucket(60, 0.0), {"greedy": 0, "rare": 0}, 0.0
    for second in range(600):
        now = float(second)
        for name in ("greedy", "greedy", "rare") if second % 20 == 0 else ("greedy", "greedy"):
            if not bucket.wait(name, 1, now):
                bucket.take(name, 1, now)
                served[name] += 1
    assert served["rare"] >= 29 and served["greedy"] >= 600 - 30


def test_coming_and_going_fills_nobody_up():
    """A debt is not forgiven by staying away, nor is a full bucket had by coming back."""
    bucket = SharedBucket(60, 0.0)
    bucket.take("a", 240, 0.0)  # owes 180, three minutes
    assert bucket.wait("a", 1, 170.0) > 0
    assert bucket.wait("b", 30, 180.5) > 0  # a new name finds what there is: next to nothing
    assert bucket.is_full(400.0)


def test_an_allowance_that_changes_keeps_what_is_owed():
    bucket = SharedBucket(60, 0.0)
    bucket.take("a", 100, 0.0)
    bucket.resize(6000, 0.0)
    assert bucket.wait("a", 1, 0.0) == pytest.approx(0.41)
    bucket.resize(60, 30.0)
    assert bucket.wait("a", 60, 30.0) == 0.0
    assert bucket.wait("a", 61, 30.0) == 0.0  # above the share: owed
    bucket.take("a", 61, 30.0)
    assert bucket.wait("a", 1, 30.0) == pytest.approx(2.0)


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.booleans(), st.floats(0, 2)), max_size=80),
)
def test_slots_are_never_more_than_the_limit_and_never_lost(limit, steps):
    slots, running, now = Slots(limit), [], 0.0
    for holder, wanted, ends, pause in steps:
        now += pause
        count = min(wanted, limit)
        if ends and running:
            holder, count = running.pop(0)
            slots.give(holder, now, count)
        elif not slots.wait(holder, now, count):
            slots.take(holder, count)
            running.append((holder, count))
        assert sum(slots.running.values()) == sum(count for _, count in running) <= limit
    for holder, count in running:
        slots.give(holder, now, count)
    assert slots.running == {}
    assert slots.wait("d", now + CLAIM_SECONDS + 0.1) == 0.0  # nobody's place in the line outlives its time


@pytest.mark.parametrize(("limit", "flooders"), [(4, 1), (6, 2), (1, 1), (2, 5)])
def test_slots_are_shared_with_a_flood(limit, flooders):
    """Requests of a second. The flood asks every 10 ms; the quiet one has as many clients as its share, and they wait.

    Where there are fewer slots than holders, each turn of the quiet one may cost it the second that it waits.
    """
    slots, running, served, seconds = Slots(limit), [], Counter(), 120
    share = -(-limit // (flooders + 1))
    asks = [0.0] * share
    for tick in range(seconds * 100):
        now = tick / 100
        for entry in [entry for entry in running if entry[0] <= now]:
            running.remove(entry)
            slots.give(entry[1], now)
        turns = [(f"flood{number}", None) for number in range(flooders)]
        turns += [("quiet", client) for client in range(share) if now >= asks[client]]
        for name, client in turns:
            refused = slots.wait(name, now)
            if not refused:
                slots.take(name)
                running.append((now + 1.0, name))
                served[name] += 1
            if client is not None:
                asks[client] = now + (RETRY_SECONDS if refused else 1.0)
    fair = seconds * limit / (flooders + 1)
    assert served["quiet"] >= (0.8 if limit > flooders else 0.5) * fair
    assert served.total() >= 0.65 * seconds * limit


def test_one_alone_has_all_slots():
    slots = Slots(3)
    for _ in range(3):
        assert slots.wait("a", 0.0) == 0.0
        slots.take("a")
    assert slots.wait("a", 0.0) == RETRY_SECONDS
    assert slots.wait("b", 0.0) == RETRY_SECONDS
    slots.give("a", 0.1)
    assert slots.wait("a", 0.1) == RETRY_SECONDS  # the free one is kept for b
    assert slots.wait("b", 0.1) == 0.0


def test_a_share_is_kept_between_two_requests():
    """Both of the quiet one's requests end in one pass; the flood asks before it comes back."""
    slots = Slots(4)
    for holder in ("flood", "flood", "quiet", "quiet"):
        assert slots.wait(holder, 0.0) == 0.0
        slots.take(holder)
    slots.give("quiet", 1.0)
    slots.give("quiet", 1.0)
    assert slots.wait("flood", 1.0) == RETRY_SECONDS
    assert slots.wait("quiet", 1.0 + GAP_SECONDS) == 0.0
    assert slots.wait("flood", 1.0 + GAP_SECONDS + 0.1) == 0.0  # it has not come back


def test_several_slots_are_given_all_or_none_and_those_that_are_free_are_kept_for_them():
    slots = Slots(4)
    slots.take("small", 2)
    assert slots.wait("large", 0.0, 4) == slots.wait("small", 0.0) == RETRY_SECONDS
    slots.give("small", 0.5)
    assert slots.wait("other", 0.5) == slots.wait("large", 0.5, 4) == RETRY_SECONDS
    slots.give("small", 1.0)
    assert slots.wait("large", 1.0, 4) == 0.0  # more than its share, but it has nothing else
    slots.take("large", 4)
    slots.give("large", 2.0, 4)
    assert slots.wait("large", 2.0, 4) == RETRY_SECONDS  # now it is another's turn
    assert slots.wait("other", 2.0) == 0.0


def test_a_place_in_the_line_ends():
    slots = Slots(1)
    slots.take("a")
    assert slots.wait("b", 0.0)
    slots.give("a", 0.0)
    assert slots.wait("a", CLAIM_SECONDS)
    assert slots.wait("a", CLAIM_SECONDS + 0.01) == 0.0
