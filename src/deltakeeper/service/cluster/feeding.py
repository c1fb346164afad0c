"""One answer, whichever replicas give it: what is lost with one is asked again of another, and goes on where it was.

That is exact, and not only likely: an answer follows from its prompt, its seed and its tenant's version. The replica
that takes over makes it from the beginning, and what the client has already is held against it token by token.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from deltakeeper.engine import Request
from deltakeeper.engine.stream import Stream
from deltakeeper.service.cluster.calls import Replicas
from deltakeeper.service.cluster.failures import ReplicaLostError
from deltakeeper.service.cluster.messages import Asked, Piece, Told
from deltakeeper.service.errors import Unavailable

_log = logging.getLogger("deltakeeper.service")

LOST = "replica_lost"
"""`error.code` of an answer that no other replica could go on with."""
_SEED_BITS = 63


@dataclass
class Tally:
    """What became of answers whose replica was lost.

    Attributes:
        retried: asked again before their first token.
        resumed: asked again after it, and gone on with.
        lost: ended with an error.
    """

    retried: int = 0
    resumed: int = 0
    lost: int = 0


def reproducible(request: Request) -> Request:
    """The same request with a seed, which one that is drawn from gets from here: it then has one answer only."""
    if request.sampling.greedy or request.sampling.seed is not None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=secrets.randbits(_SEED_BITS)))


async def feed(
    stream: Stream,
    asked: Asked,
    replicas: Replicas,
    *,
    tries: int,
    unchanged: Callable[[Asked], bool],
    tally: Tally,
    listen: Callable[[Told], None],
) -> None:
    """Fill a stream to its end.

    Args:
        stream: what the client reads; it has no token yet.
        asked: a reproducible request.
        replicas: which answer it.
        tries: how often it is asked at most.
        unchanged: whether its tenant's name still stands for what it stood for.
        tally: counts what happens.
        listen: told of decisions that come with an answer that failed.
    """
    answer = _Answer(stream)
    for left in reversed(range(tries)):
        answer.restart()
        try:
            async with aclosing(replicas.answer(asked)) as pieces:
                async for piece in pieces:
                    if not answer.take(piece):
                        _end_lost(stream, tally, "another replica gives another answer")
                        return
                    if (end := piece.ended) is not None:
                        if end.told is not None:
                            with suppress(Unavailable):  # it comes again with the replica's next report
                                listen(end.told)
                        stream.end(end.reason, stop=end.stop, error=end.error)
                        return
            raise ReplicaLostError("the replica's answer broke off.")
        except ReplicaLostError as error:
            begun = answer.given > 0
            if not left or (begun and not unchanged(asked)):
                _end_lost(stream, tally, str(error))
                return
            tally.retried += not begun
            tally.resumed += begun
            _log.warning("request %s is asked again after %d tokens: %s", stream.id, answer.given, error)


class _Answer:
    """What a client has of an answer, and how far it has been seen again."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._ids, self._at = stream, list[int](), 0
        self._version: str | None = None

    @property
    def given(self) -> int:
        """Tokens that the client has."""
        return len(self._ids)

    def restart(self) -> None:
        """It begins again."""
        self._at = 0

    def take(self, piece: Piece) -> bool:
        """Pass on what is new; false where it does not go on from what the client has."""
        stream, now = self._stream, time.perf_counter()
        if piece.version is not None:
            if self._ids and piece.version != self._version:
                return False
            self._version = piece.version
        if not self._ids:
            stream.cached_tokens = piece.cached_tokens
            if piece.admitted_seconds is not None:
                stream.times.admitted = max(stream.times.submitted, now - piece.admitted_seconds)
            if piece.prompt_logprobs is not None:
                stream.prompt_logprobs = list(piece.prompt_logprobs)
        for token in piece.tokens:
            if self._at < len(self._ids):
                if self._ids[self._at] != token.id:
                    return False
            else:
                stream.times.first_token = stream.times.first_token or now
                self._ids.append(token.id)
                stream.put(token)
            self._at += 1
        return piece.ended is None or self._at == len(self._ids)


def _end_lost(stream: Stream, tally: Tally, why: str) -> None:
    tally.lost += 1
    _log.error("request %s was lost: %s", stream.id, why)
    stream.end("error", error="What answered was lost, and nothing else could go on; ask again.", code=LOST)
