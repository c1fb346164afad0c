"""Places are shared: who floods keeps its part, others come in within some passes, and no token is another for it."""

from __future__ import annotations

import functools

import pytest
from engine_cases import prompts_of, settings_of

from deltakeeper.engine import Engine, QueueFullError, Request
from deltakeeper.engine.blocks import BLOCK
from deltakeeper.engine.line_room import LineRoom
from deltakeeper.engine.parties import PATIENCE, SLICE
from deltakeeper.engine.sequence import Sequence
from deltakeeper.engine.stream import Stream
from deltakeeper.engine.waiting import WaitingLine
from deltakeeper.testing.models import build_model

FLOOD = prompts_of(*[3] * 8, seed=5)
LONG = 50  # tokens of an answer; the tiny model knows 64


@functools.cache
def llama():
    return build_model("llama")


@functools.cache
def solo(prompt, new_tokens):
    with Engine(llama(), None, settings=settings_of()) as engine:
        return engine.generate([Request(prompt, max_new_tokens=new_tokens, ignore_eos=True)])[0].tokens


def flood(engine, count=8, owner="flood"):
    return [engine.submit(Request(p, max_new_tokens=LONG, ignore_eos=True, owner=owner)) for p in FLOOD[:count]]


def passes_until(engine, reached, most=300):
    for count in range(most):
        if reached():
            return count
        engine.step()
    raise AssertionError(f"not within {most} passes")


@pytest.mark.parametrize("limits", [{}, {"prefix_sharing": False}, {"max_step_tokens": 4}], ids=str)
def test_one_that_floods_holds_another_up_for_some_passes_alone(limits):
    with Engine(llama(), None, settings=settings_of(max_running=4, **limits)) as engine:
        floods = flood(engine)
        for _ in range(6):
            engine.step()
        assert engine.stats().running == 4 and engine.stats().preemptions == 0
        quiet = engine.submit(Request(FLOOD[0], max_new_tokens=1, owner="quiet"))
        assert passes_until(engine, lambda: quiet.finish_reason) <= PATIENCE + 5
        assert engine.stats().preemptions == 1  # one place, which comes back to whom it was taken from
        passes_until(engine, lambda: engine.stats().running == 4, most=2)
        while engine.step():
            pass
    assert [stream.result().tokens for stream in floods] == [solo(prompt, LONG) for prompt in FLOOD]
    assert quiet.result().tokens == solo(FLOOD[0], 1)


def test_each_gets_an_equal_part_and_what_another_does_not_want():
    with Engine(llama(), None, settings=settings_of(max_running=6)) as engine:
        floods = flood(engine)
        engine.step()
        others = [stream for owner in ("b", "c") for stream in flood(engine, 3, owner)]
        modest = flood(engine, 1, "modest")

        def running():
            owners = [s.request.owner for s in engine._core.scheduler.running]
            return [owners.count(owner) for owner in ("flood", "b", "c", "modest")]

        passes_until(engine, lambda: running()[3], most=PATIENCE + 8)
        passes_until(engine, lambda: max(running()) == 2 and sum(running()) == 6, most=12)
        while engine.step():
            pass
    expected = [solo(p, LONG) for p in (*FLOOD, *FLOOD[:3], *FLOOD[:3], FLOOD[0])]
    assert [stream.result().tokens for stream in (*floods, *others, *modest)] == expected


def test_nobody_loses_a_place_where_nobody_waits_for_one():
    with Engine(llama(), None, settings=settings_of(max_running=9)) as engine:
        flood(engine)
        engine.step()
        engine.submit(Request(FLOOD[0], max_new_tokens=LONG, ignore_eos=True, owner="quiet"))
        while engine.step():
            pass
        assert engine.stats().preemptions == 0
    with Engine(llama(), None, settings=settings_of(max_running=2)) as engine:  # nor to its own owner
        flood(engine)
        while engine.step():
            pass
        assert engine.stats().preemptions == 0


def test_when_memory_is_short_it_is_taken_from_whoever_has_the_most_places():
    prompts = prompts_of(*[17] * 4, seed=4)
    block = 2 * 2 * 2 * 12 * BLOCK * 4  # keys and values, layers, heads, width, tokens, float32
    with Engine(llama(), None, settings=settings_of(max_running=8, kv_bytes=12 * block)) as engine:
        for prompt in prompts[:3]:
            engine.submit(Request(prompt, max_new_tokens=40, ignore_eos=True, owner="flood"))
        quiet = engine.submit(Request(prompts[3], max_new_tokens=40, ignore_eos=True, owner="quiet"))
        engine.step()
        assert engine.stats().running == 4
        assert passes_until(engine, lambda: quiet.finish_reason) <= 42  # it never loses its blocks, though it came last
        assert engine.stats().preemptions > 0


def test_a_long_prompt_of_one_does_not_hold_up_that_of_another():
    with Engine(llama(), None, settings=settings_of(max_step_tokens=8)) as engine:
        for prompt in prompts_of(*[60] * 6):
            engine.submit(Request(prompt, max_new_tokens=1, owner="flood"))
        engine.step()
        quiet = engine.submit(Request(prompts_of(12)[0], max_new_tokens=1, owner="quiet"))
        assert passes_until(engine, lambda: quiet.finish_reason) <= 4


def line_with(*owners):
    line = WaitingLine(LineRoom(1000))
    for owner in owners:
        push(line, owner)
    return line


def push(line, owner, tenant=None):
    request = Request((5,), owner=owner, tenant=tenant)
    line.room.enter(owner, 1)
    line.push(Sequence(request, Stream(request.id, 1), 2))


def test_an_owner_gains_nothing_by_asking_many_tenants():
    line = line_with("modest", "modest", "modest", "modest")
    for number in range(20):
        push(line, "greedy", f"tenant {number}")
    owners = []
    for _ in range(8):
        line.start(sequence := line.next(()))
        owners.append(sequence.request.owner)
    assert owners.count("modest") == 4


def test_where_there_are_more_owners_than_places_they_take_turns():
    line = line_with("a", "b")
    line.start(first := line.next(()))
    line.passes += 10 * PATIENCE
    line.charge(first, SLICE)
    assert not list(line.claims())
    line.charge(first, 1)
    ((claimant, _),) = line.claims()
    assert (first.request.owner, claimant.request.owner) == ("a", "b")
    line.put_back(first)
    line.start(claimant)
    line.charge(claimant, 2 * SLICE)
    assert not list(line.claims())  # a was given as much before
    line.charge(claimant, 2)
    assert [sequence for sequence, _ in line.claims()] == [first]


def test_what_was_not_asked_for_long_ago_is_not_made_up_for():
    """One runs a little, one very much; when both want all there is, the first is not preferred without end."""
    line = line_with("little", "much")
    little, much = line.next(()), None
    line.start(little)
    line.start(much := line.next(()))
    line.charge(little, 10)
    line.charge(much, 1e6)
    push(line, "little")
    push(line, "much")
    assert line.next(()).request.owner == "little"
    assert line.served(much)[0] - line.served(little)[0] <= 4 * SLICE


def test_an_owner_leaves_room_in_the_line_for_others():
    room = LineRoom(16, 1000)

    def fill(owner, tokens=1):
        count = 0
        while True:
            try:
                room.enter(owner, tokens)
            except QueueFullError:
                return count
            count += 1

    assert [fill(owner) for owner in "abc"] == [8, 4, 2]
    room.enter("d", 1)
    for _ in range(8):
        room.leave("a", 1)
    assert [fill("d", 200), fill("e", 300), fill("e", 1)] == [2, 1, 0]
    with pytest.raises(QueueFullError, match="ask again later"):
        room.enter("f", 600)
