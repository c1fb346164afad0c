"""One replica: base, overlay, store, policy and engine in a process, asked by an ingress elsewhere. Knows no Ray."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from deltakeeper.engine import Request
from deltakeeper.engine.request import QueueFullError
from deltakeeper.engine.stream import Stream
from deltakeeper.errors import DataError, DeltakeeperError, TenantError
from deltakeeper.live_base import open_base
from deltakeeper.service.admission import read_policy
from deltakeeper.service.admission.policy import PolicyFile
from deltakeeper.service.admission_port import Decision
from deltakeeper.service.bell import Bell
from deltakeeper.service.cluster.failures import failure_of
from deltakeeper.service.cluster.messages import (
    Asked,
    Ended,
    Failure,
    Loaded,
    Looked,
    Piece,
    Place,
    ReplicaPlan,
    Report,
    Told,
)
from deltakeeper.service.cluster.shared_work import share
from deltakeeper.service.engine_room import opened_room

_PAUSE = 0.02
_MOST_DECISIONS = 100
"""Latest decisions in a report; the ingress asks far more often than so many are made."""


class Replica:
    """Holds a base and those tenants that requests bring here.

    The ingress tells it nothing beforehand: a request carries what its tenant's name stands for, and one that has just
    started serves it like any other.

    Args:
        plan: what it is made of.
        name: its id, unique in the cluster.
        node: id of the node that it runs on.

    Raises:
        DataError: the node has another version of this package, another base or another policy than the ingress.
    """

    def __init__(self, plan: ReplicaPlan, name: str, node: str) -> None:
        self._plan, self._name, self._node = plan, name, node
        if (own := metadata.version("deltakeeper")) != plan.version:
            raise DataError(f"node {node} has deltakeeper {own} and the ingress {plan.version}; install the same.")
        policy = _same_policy(plan)
        base = open_base(plan.base)
        if base.root != plan.root:
            raise DataError(
                f"the base {base.path} of node {node} is not that of the ingress; copy the same files there."
            )
        self._stack = ExitStack()
        room = self._stack.enter_context(
            opened_room(
                base,
                None,
                delta_bytes=plan.delta_bytes,
                loaders=plan.loaders,
                engine=plan.engine,
                policy=policy,
                decisions=plan.decisions / f"{name}.jsonl",
                with_defaults=plan.with_defaults,
            )
        )
        self._engine, self._store, self._admission = room.engine, room.store, room.admission
        self._lock = threading.Lock()
        self._places: dict[str, Place] = {}
        self._failed: dict[str, Place] = {}
        self._turning: dict[str, tuple[int, Future[str]]] = {}

    @property
    def alive(self) -> bool:
        """Whether its engine serves requests."""
        return self._engine.alive

    async def answer(self, asked: Asked) -> AsyncIterator[Piece]:
        """Answer a request; when whoever iterates goes away, the engine stops at its next pass."""
        stream: Stream | None = None
        try:
            if asked.place is not None:
                await self._keep(asked.place)
            event = asyncio.Event()
            stream = await self._submit(asked.request, Bell(asyncio.get_running_loop(), event).ring)
            async for piece in self._pieces(stream, event, asked.request.tenant):
                yield piece
        except DeltakeeperError as error:
            yield Piece(ended=Ended("error", error=str(error), told=self._told()))
        finally:
            if stream is not None and stream.finish_reason is None:
                stream.cancel()

    async def load(self, place: Place) -> Loaded | Failure:
        """Load a tenant, and see it through its canary where policy asks for one."""
        found = await self._load(place)
        with self._lock:
            if isinstance(found, Loaded):
                self._failed.pop(place.name, None)
            elif self._places.get(place.name) == place:
                self._failed[place.name] = place
        return found

    async def _load(self, place: Place) -> Loaded | Failure:
        name = place.name
        try:
            await self._keep(place)
            if self._admission is not None:
                decision = await asyncio.to_thread(self._admission.settle, name, self._plan.settle_seconds)
                if decision.verdict == "refused":
                    return Failure("Refused", " ".join(decision.reasons), self._told())
            while (lease := self._store.acquire(name)) is None:
                await asyncio.wrap_future(self._store.load(name))
            with lease:
                return Loaded(lease.version, lease.delta.vocabulary, dict(lease.delta.side_files), self._told())
        except DeltakeeperError as error:
            return failure_of(error, self._told())

    async def decide(self, name: str, folder: Path) -> Looked | Failure:
        """What policy says of files."""
        if self._admission is None:
            return Failure("DataError", "This replica has no policy.")
        try:
            return Looked(await asyncio.to_thread(self._admission.decide, name, folder), self._told())
        except DeltakeeperError as error:
            return failure_of(error, self._told())

    def unload(self, name: str) -> None:
        """Free a tenant's memory here."""
        with suppress(TenantError):  # it never came here
            self._store.unload(name)

    def remove(self, name: str) -> None:
        """Forget a tenant here."""
        with self._lock:
            for noted in (self._places, self._failed, self._turning):
                noted.pop(name, None)
            with suppress(TenantError):
                self._store.remove(name)

    def report(self) -> Report:
        """Where it stands."""
        return Report(
            told=self._told(),
            node=self._node,
            pid=os.getpid(),
            context=self._engine.context,
            engine=replace(self._engine.stats(), recent_steps=()),
            store=self._store.stats(),
        )

    def close(self) -> None:
        """End what runs, and free everything."""
        self._stack.close()

    async def _submit(self, request: Request, wake: Callable[[], None]) -> Stream:
        """Hand in what the ingress has admitted; a line full of cancelled requests empties with the next pass."""
        while True:
            try:
                return self._engine.submit(request, wake)
            except QueueFullError:
                await asyncio.sleep(_PAUSE)

    async def _keep(self, place: Place) -> None:
        """See to it that a name stands here for what it stands for at the ingress, or for something later."""
        turning = await asyncio.to_thread(self._turn, place)
        if turning is not None:
            await asyncio.wrap_future(share(turning))  # other requests wait for it too

    def _turn(self, place: Place) -> Future[str] | None:
        name = place.name
        with self._lock:
            held = self._places.get(name)
            if held is None:
                self._store.register(name, place.path, planes=place.planes)
                self._places[name] = place
                return None
            given_up = held == self._failed.get(name) != place  # what would have taken its place did not load
            if held.generation >= place.generation and not given_up:
                return None
            generation, future = self._turning.get(name, (0, None))
            if future is not None and generation >= place.generation:
                return future
            turn = self._store.replace if self._admission is None else self._admission.replace
            future = turn(name, place.path, planes=place.planes)
            self._turning[name] = (place.generation, future)
        future.add_done_callback(lambda done: self._turned(place, done))
        return future

    def _turned(self, place: Place, done: Future[str]) -> None:
        with self._lock:
            if self._turning.get(place.name, (0, None))[1] is done:
                del self._turning[place.name]
                if not done.cancelled() and done.exception() is None:
                    self._places[place.name] = place
                    self._failed.pop(place.name, None)

    def _told(self) -> Told:
        if self._admission is None:
            return Told(self._name)
        entries = reversed(self._admission.history(limit=_MOST_DECISIONS))
        return Told(self._name, tuple((entry["number"], _decision(entry)) for entry in entries))

    async def _pieces(self, stream: Stream, event: asyncio.Event, tenant: str | None) -> AsyncIterator[Piece]:
        begun = False
        while not stream.ended:
            await event.wait()
            event.clear()
            tokens = tuple(stream.take())
            ended = self._ended(stream) if stream.ended else None
            if tokens and not begun:
                begun = True
                yield Piece(
                    tokens=tokens,
                    version=None if tenant is None else self._version(tenant),
                    admitted_seconds=time.perf_counter() - stream.times.admitted,
                    cached_tokens=stream.cached_tokens,
                    prompt_logprobs=None if stream.prompt_logprobs is None else tuple(stream.prompt_logprobs),
                    ended=ended,
                )
            elif tokens or ended is not None:
                yield Piece(tokens=tokens, cached_tokens=stream.cached_tokens, ended=ended)

    def _ended(self, stream: Stream) -> Ended:
        assert stream.finish_reason is not None
        told = self._told() if stream.finish_reason == "error" else None
        return Ended(stream.finish_reason, stream.stop, stream.error, told=told)

    def _version(self, tenant: str) -> str | None:
        stats = self._store.stats().tenants.get(tenant)
        return None if stats is None else stats.version


def _decision(entry: dict[str, Any]) -> Decision:
    values = {field.name: entry[field.name] for field in fields(Decision)}
    return Decision(**values | {"reasons": tuple(values["reasons"])})


def _same_policy(plan: ReplicaPlan) -> PolicyFile | None:
    if plan.policy is None:
        return None
    policy = read_policy(plan.policy)
    if policy.sha256 != plan.policy_sha256:
        raise DataError(f"the policy {plan.policy} is not that of the ingress; copy the same file to every node.")
    return policy
