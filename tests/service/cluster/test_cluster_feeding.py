"""Answers whose replica is lost: asked again, gone on with where that is exact, and ended where it is not."""

from __future__ import annotations

import asyncio

import pytest

from deltakeeper.engine import Request, Sampling, Token
from deltakeeper.engine.stream import Stream
from deltakeeper.service.cluster.failures import ReplicaLostError
from deltakeeper.service.cluster.feeding import LOST, Tally, feed, reproducible
from deltakeeper.service.cluster.messages import Asked, Ended, Piece, Place, Told
from deltakeeper.service.errors import Unavailable

WHOLE = tuple(Token(at, f"w{at} ", None) for at in range(6))


class Script:
    """Replicas that answer by a script: one list of pieces a try, of which an exception ends one."""

    def __init__(self, *tries):
        self.tries, self.calls, self.closed = list(tries), 0, 0

    async def answer(self, asked):
        self.calls += 1
        try:
            for step in self.tries.pop(0):
                if isinstance(step, Exception):
                    raise step
                yield step
        finally:
            self.closed += 1


def piece(start, stop, version="v", ended=None):
    return Piece(WHOLE[start:stop], version=version if start == 0 else None, admitted_seconds=0.0, ended=ended)


LOST_NOW = ReplicaLostError("it died.")
STOP = Ended("stop", stop=2)


def run(script, *, tries=3, unchanged=True, place=True):
    stream, tally, told = Stream("id", 4), Tally(), []
    asked = Asked(Request((1, 2), "signs" if place else None), Place("signs", "x", None, 1) if place else None)
    work = feed(stream, asked, script, tries=tries, unchanged=lambda asked: unchanged, tally=tally, listen=told.append)
    asyncio.run(work)
    return stream.completion(), stream, tally, told


def test_pieces_become_the_stream_that_routes_read():
    found, stream, tally, told = run(Script([piece(0, 2), piece(2, 6, ended=STOP)]))
    assert (found.tokens, found.text) == (tuple(range(6)), "w0 w1 w2 w3 w4 w5 ")
    assert (found.finish_reason, found.stop, found.error) == ("stop", 2, None)
    assert 0 < stream.times.submitted <= stream.times.admitted <= stream.times.first_token <= stream.times.finished
    assert tally == Tally() and told == []


def test_an_answer_without_a_token_is_asked_again():
    script = Script([LOST_NOW], [], [piece(0, 6, ended=STOP)])
    found, _, tally, _ = run(script)
    assert found.finish_reason == "stop" and len(found.tokens) == 6
    assert tally == Tally(retried=2) and script.closed == script.calls == 3


def test_an_answer_goes_on_where_it_was_and_no_token_comes_twice():
    script = Script(
        [piece(0, 3), LOST_NOW], [piece(0, 1), piece(1, 2), LOST_NOW], [piece(0, 5), piece(5, 6, ended=STOP)]
    )
    found, _, tally, _ = run(script)
    assert found.tokens == tuple(range(6)) and found.finish_reason == "stop"
    assert tally == Tally(resumed=2)


@pytest.mark.parametrize(
    "second",
    [
        [piece(0, 6, version="other", ended=STOP)],
        [Piece((WHOLE[0], WHOLE[4]), version="v")],
        [piece(0, 2, ended=STOP)],
    ],
    ids=["another version", "another token", "a shorter answer"],
)
def test_an_answer_that_would_go_on_otherwise_ends_as_lost(second):
    found, stream, tally, _ = run(Script([piece(0, 3), LOST_NOW], second))
    assert (found.finish_reason, stream.code) == ("error", LOST) and found.tokens == (0, 1, 2)
    assert tally == Tally(resumed=1, lost=1)


def test_a_name_that_was_turned_over_meanwhile_is_not_gone_on_with_but_may_begin():
    found, stream, tally, _ = run(Script([piece(0, 3), LOST_NOW]), unchanged=False)
    assert stream.code == LOST and tally == Tally(lost=1)
    found, stream, tally, _ = run(Script([LOST_NOW], [piece(0, 6, ended=STOP)]), unchanged=False)
    assert found.finish_reason == "stop" and tally == Tally(retried=1)


def test_tries_have_an_end():
    script = Script(*[[LOST_NOW]] * 9)
    _, stream, tally, _ = run(script, tries=3)
    assert (stream.finish_reason, stream.code, script.calls) == ("error", LOST, 3)
    assert tally == Tally(retried=2, lost=1)


def test_a_failure_of_the_replica_itself_is_passed_on_with_what_policy_said():
    said = Told("r0")
    ended = Ended("error", error="it is not admitted.", told=said)
    found, stream, tally, told = run(Script([Piece(ended=ended)]))
    assert (found.error, stream.code, told, tally) == ("it is not admitted.", None, [said], Tally())


def test_a_failure_stays_what_it_is_where_what_policy_said_cannot_be_noted():
    def listen(told):
        raise Unavailable("It cannot be written down.")

    stream, asked = Stream("id", 4), Asked(Request((1, 2), "signs"), Place("signs", "x", None, 1))
    script = Script([Piece(ended=Ended("error", error="it is not admitted.", told=Told("r0")))])
    asyncio.run(feed(stream, asked, script, tries=1, unchanged=lambda asked: True, tally=Tally(), listen=listen))
    assert stream.completion().error == "it is not admitted."


def test_whoever_draws_without_a_seed_gets_one_so_that_there_is_one_answer():
    greedy, seeded = Request((1,)), Request((1,), sampling=Sampling(temperature=1.0, seed=5))
    assert reproducible(greedy) is greedy and reproducible(seeded) is seeded
    drawn = Request((1,), sampling=Sampling(temperature=1.0, top_p=0.5))
    first, second = reproducible(drawn).sampling, reproducible(drawn).sampling
    assert first.seed is not None and first.seed != second.seed and first.top_p == 0.5
