"""Clients of a soak: each asks, waits a moment, and asks something else; every answer is held to the known one."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from soak_ledger import Ledger
from soak_requests import RAW, Case, Malformed, cases, malformed

SECONDS = 120
"""Longest wait for anything."""
_PASSING = {("model_not_loaded", 503), ("queue_full", 503)}
"""Errors that a client may meet while deltas come and go."""
_NEVER_FITS = ("quota_too_small", 400)
"""What asks for more answers at a time than its key may have is told so, and not to come back."""


class Standing:
    """What a name may stand for at this moment, as far as its clients can know; None is nothing."""

    def __init__(self, model: str | None) -> None:
        self.possible: set[str | None] = {model}
        self._watching: list[set[str | None]] = []

    @contextmanager
    def watched(self) -> Iterator[set[str | None]]:
        """All that the name may have stood for since the block began."""
        seen = set(self.possible)
        self._watching.append(seen)
        try:
            yield seen
        finally:
            self._watching = [other for other in self._watching if other is not seen]

    def turn(self, model: str | None) -> None:
        """A change has begun: both are possible."""
        for seen in (self.possible, *self._watching):
            seen.add(model)

    def settle(self, model: str | None) -> None:
        """A change has ended: what is asked from now on meets this alone."""
        self.possible = {model}


class Book:
    """The answer of each model to each case, as it was given with nobody else there."""

    def __init__(self) -> None:
        self.cases: list[Case] = cases()
        self._answers: dict[tuple[str, str], tuple[str, ...]] = {}

    def record(self, client: httpx.Client, models: list[str]) -> None:
        """Ask everything once, one after the other, and see that no two models say the same.

        Raises:
            RuntimeError: two models give one answer, so that taking one for the other would not be seen.
        """
        for model in models:  # one after the other, since only some of them fit into memory
            for case in self.cases:
                answer = client.post(case.path, json={**case.body, "model": model})
                answer.raise_for_status()
                self._answers[model, case.name] = case.texts(answer.json())
        owners: dict[tuple[str, tuple[str, ...]], str] = {}
        for (model, name), texts in self._answers.items():
            if (other := owners.setdefault((name, texts), model)) != model:
                raise RuntimeError(f"{model} and {other} say the same to '{name}', which proves nothing.")

    @property
    def size(self) -> int:
        """Number of answers."""
        return len(self._answers)

    def fault(self, seen: set[str | None], case: Case, texts: tuple[str, ...], whole: bool) -> str | None:
        """What is wrong with an answer, or with the beginning of one, of a name that may stand for any of `seen`."""
        known = {model: self._answers[model, case.name] for model in seen if model is not None}
        if any(_fits(texts, answer, whole) for answer in known.values()):
            return None
        for (model, name), answer in self._answers.items():
            if name == case.name and _fits(texts, answer, whole):
                return f"cross-tenant: the answer of {model}"
        return "an answer that nobody gives"


def _fits(texts: tuple[str, ...], answer: tuple[str, ...], whole: bool) -> bool:
    if whole:
        return texts == answer
    return len(texts) == len(answer) and all(a.startswith(t) for t, a in zip(texts, answer, strict=True))


@dataclass
class Crowd:
    """All clients.

    Attributes:
        url: of the service.
        admin: the admin key.
        keys: the key of each name, which may ask that name alone.
        standings: what each name stands for.
        book: known answers.
        ledger: where everything is counted.
        think: mean seconds between two requests of a client.
        limited: names whose keys have a quota.
    """

    url: str
    admin: str
    keys: Mapping[str, str]
    standings: Mapping[str, Standing]
    book: Book
    ledger: Ledger
    think: float
    limited: frozenset[str] = frozenset()
    open: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False
    under_way: int = 0
    client: httpx.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = self._connect()

    def _connect(self) -> httpx.AsyncClient:
        # a connection that was idle is given up before the service could close it
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=50, keepalive_expiry=1)
        return httpx.AsyncClient(base_url=self.url, timeout=SECONDS, limits=limits, trust_env=False)

    async def rest(self) -> None:
        """Let nobody ask, wait until all have their answers, and close all connections."""
        self.open.clear()
        while self.under_way:
            await asyncio.sleep(0.05)
        await self.client.aclose()
        self.client = self._connect()

    async def visit(self, number: int) -> None:
        """One client, until the end."""
        chance = random.Random(number)
        acts: list[tuple[Callable[[random.Random], Awaitable[None]], int]] = [
            (self.ask_whole, 30),
            (self.ask_stream, 30),
            (self.cut_stream, 12),
            (self.give_up, 4),
            (self.ask_foreign, 8),
            (self.send_malformed, 13),
            (self.send_raw, 3),
        ]
        await self.repeat(chance, lambda: chance.choices(*zip(*acts, strict=True))[0](chance))

    async def repeat(self, chance: random.Random, act: Callable[[], Awaitable[None]], slower: float = 1.0) -> None:
        """Do something again and again while the crowd is open."""
        while not self.ended:
            await self.open.wait()
            self.under_way += 1
            try:
                await act()
            except httpx.HTTPError as error:
                self.ledger.blame("a broken connection", f"{type(error).__name__}: {error}")
            except Exception as error:
                self.ledger.blame("a client that failed", f"{type(error).__name__}: {error}")
            finally:
                self.under_way -= 1
            await asyncio.sleep(slower * min(chance.expovariate(1 / self.think), 5 * self.think))

    async def ask_whole(self, chance: random.Random) -> None:
        """Ask for an answer in one piece."""
        name, case, key = self._pick(chance)
        with self.standings[name].watched() as seen:
            answer = await self._post(case.path, {**case.body, "model": name}, key)
            if answer.status_code == 200:
                self._judge("whole", name, seen, case, case.texts(answer.json()), True)
            else:
                self._refused("whole", name, seen, answer.status_code, answer.headers, answer.json())

    async def ask_stream(self, chance: random.Random) -> None:
        """Read a stream to its end, now and then slowly."""
        await self._stream("stream", chance, None)

    async def cut_stream(self, chance: random.Random) -> None:
        """Go away in the middle of a stream."""
        await self._stream("cut", chance, chance.randint(0, 40))

    async def give_up(self, chance: random.Random) -> None:
        """Go away while an answer in one piece is made."""
        name, case, key = self._pick(chance, long=True)
        try:
            async with asyncio.timeout(chance.uniform(0.01, 0.3)):
                await self._post(case.path, {**case.body, "model": name}, key)
            self.ledger.count("given up", "too late")
        except TimeoutError:
            self.ledger.count("given up", "gone")

    async def ask_foreign(self, chance: random.Random) -> None:
        """Ask with the key of another tenant, which must look as if there were no such model."""
        owner, other = chance.sample(sorted(self.keys), 2)
        asked = chance.choice([other, "base", f"nobody{chance.randint(0, 99)}"])
        case = chance.choice(self.book.cases)
        stream = chance.random() < 0.5
        answer = await self._post(case.path, {**case.body, "model": asked, "stream": stream}, self.keys[owner])
        self.ledger.count("foreign", answer.status_code)
        if answer.status_code == 429 and owner in self.limited:  # counted before it is known what is asked
            return
        told = f"There is no model {asked!r}; GET /v1/models lists those that this key may ask."
        if answer.status_code != 404 or answer.json()["error"]["message"] != told:
            self.ledger.blame("a foreign model that shows", f"{owner} asks {asked}: {answer.status_code} {answer.text}")

    async def send_malformed(self, chance: random.Random) -> None:
        """Send something that has to be refused."""
        name = chance.choice([name for name in sorted(self.keys) if name.startswith("t") and name not in self.limited])
        wrong: Malformed = chance.choice(malformed(name))
        keys = {"own": self.keys[name], "admin": self.admin, "wrong": "dk-wrong"}
        headers = {} if wrong.key == "none" else {"Authorization": f"Bearer {keys[wrong.key]}"}
        answer = await self.client.request(
            wrong.method, wrong.path, content=wrong.content, headers=headers | dict(wrong.headers)
        )
        self.ledger.count("malformed", answer.status_code)
        body = _json(answer)
        # what is wrong with a prompt is only seen once its tenant, whose tokens they are, was loaded
        passing = wrong.key == "own" and (_code(body), answer.status_code) in _PASSING
        if answer.status_code not in wrong.statuses and not passing:
            self.ledger.blame("a malformed request", f"{wrong.name}: {answer.status_code} {answer.text}")
        self.ledger.check_refusal(wrong.name, answer.status_code, answer.headers, body)

    async def send_raw(self, chance: random.Random) -> None:
        """Send bytes that are no whole request, and close the connection."""
        name, content = chance.choice(sorted(RAW.items()))
        key = self.keys[chance.choice(sorted(self.keys))]
        host, _, port = self.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(content.replace(b"%s", key.encode()))
            await writer.drain()
            async with asyncio.timeout(1):
                came = await reader.read(4096)
        except (TimeoutError, ConnectionError):
            came = b""
        finally:
            writer.close()
        status = came.split(b" ", 2)[1].decode("latin-1") if came.startswith(b"HTTP/") else "silence"
        self.ledger.count("raw", status)
        if status.startswith("5"):
            self.ledger.blame(f"status {status}", f"raw, {name}: {came!r}")

    def _pick(self, chance: random.Random, long: bool | None = None) -> tuple[str, Case, str]:
        """A name, a case for it, and a key that may ask it: the tenant's own, or now and then the admin's."""
        name = chance.choice(sorted(self.standings))
        case = chance.choice([case for case in self.book.cases if long is None or case.long == long])
        key = self.keys.get(name, self.admin)
        return name, case, self.admin if chance.random() < 0.1 else key

    async def _post(self, path: str, body: dict[str, Any], key: str) -> httpx.Response:
        return await self.client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})

    async def _stream(self, kind: str, chance: random.Random, most: int | None) -> None:
        name, case, key = self._pick(chance, long=None if most is None else True)
        slowly = chance.random() < 0.1
        body = {**case.body, "model": name, "stream": True, "stream_options": {"include_usage": True}}
        texts: dict[int, str] = dict.fromkeys(range(_choices(case)), "")
        events, ended = 0, False
        with self.standings[name].watched() as seen:
            asking = self.client.stream("POST", case.path, json=body, headers={"Authorization": f"Bearer {key}"})
            async with asking as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    self._refused(kind, name, seen, answer.status_code, answer.headers, answer.json())
                    return
                async for line in answer.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        ended = True
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        self._broke_off(kind, name, seen, event["error"])
                        return
                    for choice, text in case.piece(event):
                        texts[choice] += text
                    events += 1
                    if most is not None and events > most:
                        break
                    if slowly:
                        await asyncio.sleep(0.02)
            if most is None and not ended:
                self.ledger.blame("a stream without its end", f"{name}, {case.name}: {texts}")
            self._judge(kind, name, seen, case, tuple(texts.values()), ended)

    def _judge(
        self, kind: str, name: str, seen: set[str | None], case: Case, texts: tuple[str, ...], whole: bool
    ) -> None:
        self.ledger.count(kind, "answered" if whole else "left half-way")
        fault = self.book.fault(seen, case, texts, whole)
        if fault is not None:
            self.ledger.blame(fault.partition(":")[0], f"{kind}, {name} ({seen}), {case.name}: {fault}: {texts}")

    def _refused(self, kind: str, name: str, seen: set[str | None], status: int, headers: Any, body: Any) -> None:
        code = _code(body)
        self.ledger.count(kind, f"{status} {code}" if code else status)
        self.ledger.check_refusal(f"{kind}, {name}", status, headers, body)
        gone = status == 404 and None in seen
        limited = name in self.limited and (status == 429 or (code, status) == _NEVER_FITS)
        if not gone and not limited and (code, status) not in _PASSING:
            self.ledger.blame("a refusal that nothing explains", f"{kind}, {name} ({seen}): {status} {body}")

    def _broke_off(self, kind: str, name: str, seen: set[str | None], error: dict[str, Any]) -> None:
        self.ledger.count(kind, f"broke off, {error['code']}")
        gone = error["type"] == "NotFoundError" and None in seen
        if error["type"] == "InternalServerError" or not (gone or (error["code"], 503) in _PASSING):
            self.ledger.blame("a stream that broke off", f"{kind}, {name} ({seen}): {error}")


def _choices(case: Case) -> int:
    prompts = case.body.get("prompt")
    return int(case.body.get("n", 1)) * (len(prompts) if isinstance(prompts, list) else 1)


def _code(body: Any) -> Any:
    fields = body.get("error") if isinstance(body, dict) else None
    return fields.get("code") if isinstance(fields, dict) else None


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None
