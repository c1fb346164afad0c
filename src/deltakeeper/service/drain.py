"""The end of a service: it takes nothing new, lets what runs finish, and then stops what is left."""

from __future__ import annotations

import threading

from deltakeeper.service.serving_port import AnsweringEngine


class Drain:
    """Whether the service takes requests; safe on any thread."""

    def __init__(self) -> None:
        self._announced = threading.Event()
        self._begun = threading.Event()

    @property
    def announced(self) -> bool:
        """Whether it will soon take no more, so that nothing new should be routed here."""
        return self._announced.is_set()

    @property
    def begun(self) -> bool:
        """Whether it takes no more."""
        return self._begun.is_set()

    def announce(self) -> None:
        """Say at `/ready` that the end is near; requests are still taken."""
        self._announced.set()

    def begin(self) -> None:
        """Take no more from now on: `/ready` says so, and new requests get 503."""
        self.announce()
        self._begun.set()

    def finish(self, engine: AnsweringEngine, seconds: float) -> bool:
        """Wait for running answers, then end the rest as cancelled; whether all of them came to their own end."""
        self.begin()
        finished = engine.drain(seconds)
        engine.close()
        return finished
