"""Administrators of a soak: deltas come, go and are replaced, keys are made and revoked, and somebody always looks."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

from soak_crowd import Crowd

_BUSY = {409, 503}
"""Two administrators at one name, and no room for the delta just now: nothing has changed."""


class Administrators:
    """What they do, in chance order.

    Args:
        crowd: whose standings they change.
        swings: names that stand for one of two tenants in turn.
        guests: names that come and go, and the tenant whose artifact they stand for.
        residents: tenants that are loaded, and loaded anew.
    """

    def __init__(
        self, crowd: Crowd, swings: dict[str, tuple[str, str]], guests: dict[str, str], residents: list[str]
    ) -> None:
        self._crowd, self._swings, self._guests, self._residents = crowd, swings, guests, residents
        self._taken: set[str] = set()

    async def work(self, number: int) -> None:
        """One of them, until the end."""
        chance = random.Random(10_000 + number)
        acts: list[tuple[Callable[[random.Random], Awaitable[None]], int]] = [
            (self.swing, 25),
            (self.come_or_go, 40),
            (self.load, 15),
            (self.replace_with_itself, 10),
            (self.look, 15),
            (self.change_keys, 1),
        ]
        await self._crowd.repeat(chance, lambda: chance.choices(*zip(*acts, strict=True))[0](chance), slower=1.5)

    async def swing(self, chance: random.Random) -> None:
        """Turn a name over to the other of its tenants."""
        name = chance.choice(sorted(self._swings))
        if name in self._taken:
            return
        standing = self._crowd.standings[name]
        [now] = standing.possible
        [other] = set(self._swings[name]) - {now}
        own_way = chance.random() < 0.5
        place = {"path": other, "replace": True, "load": chance.random() < 0.8}
        alias = {"lora_name": name, "lora_path": other, "load_inplace": True}
        self._taken.add(name)
        standing.turn(other)
        if own_way:
            done = await self._ask("PUT", f"/admin/deltas/{name}", place)
        else:
            done = await self._ask("POST", "/v1/load_lora_adapter", alias)
        standing.settle(other if done else now)
        self._taken.discard(name)  # and not after an error that says nothing of what was done: then it stays as it is

    async def come_or_go(self, chance: random.Random) -> None:
        """Let a name stand for an artifact, or for nothing."""
        name = chance.choice(sorted(self._guests))
        if name in self._taken:
            return
        standing = self._crowd.standings[name]
        [now] = standing.possible
        then = self._guests[name] if now is None else None
        self._taken.add(name)
        standing.turn(then)
        own_way = chance.random() < 0.5
        if then is None and own_way:
            done = await self._ask("DELETE", f"/admin/deltas/{name}", None)
        elif then is None:
            done = await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        elif own_way:
            done = await self._ask("PUT", f"/admin/deltas/{name}", {"path": then, "load": chance.random() < 0.5})
        else:
            done = await self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": then})
        standing.settle(then if done else now)
        self._taken.discard(name)

    async def load(self, chance: random.Random) -> None:
        """Load a tenant that may be loaded already, which is an error to vLLM's clients."""
        name = chance.choice(self._residents)
        await self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": name}, 400)

    async def replace_with_itself(self, chance: random.Random) -> None:
        """Load a tenant anew from its own artifact, beside what answers now."""
        await self._ask("PUT", f"/admin/deltas/{chance.choice(self._residents)}", {"replace": True})

    async def look(self, chance: random.Random) -> None:
        """Read what there is to read."""
        name = chance.choice(self._residents)
        paths = ("/admin/status", "/admin/deltas", "/metrics", "/v1/models", "/admin/decisions?limit=50", "/")
        await self._ask("GET", chance.choice([*paths, f"/admin/deltas/{name}", f"/v1/models/{name}"]), None)

    async def change_keys(self, chance: random.Random) -> None:
        """Make a key, ask with it, revoke it, and see that it opens nothing any more."""
        crowd, name = self._crowd, chance.choice(self._residents)
        headers = {"Authorization": f"Bearer {crowd.admin}"}
        made = (await crowd.client.post("/admin/keys", json={"name": "x", "models": [name]}, headers=headers)).json()
        own = {"Authorization": f"Bearer {made['secret']}"}
        before = await crowd.client.get("/v1/models", headers=own)
        gone = await crowd.client.delete(f"/admin/keys/{made['id']}", headers=headers)
        after = await crowd.client.get("/v1/models", headers=own)
        statuses = (before.status_code, gone.status_code, after.status_code)
        crowd.ledger.count("admin keys", statuses[0])
        if statuses != (200, 200, 401) or [card["id"] for card in before.json()["data"]] != [name]:
            crowd.ledger.blame("a key that opens something else", f"{name}: {statuses} {before.text}")

    async def _ask(self, method: str, path: str, body: Any, *also: int) -> bool:
        """Whether it was done; what was not is right only for a reason that passes."""
        crowd = self._crowd
        headers = {"Authorization": f"Bearer {crowd.admin}"}
        answer = await crowd.client.request(method, path, json=body, headers=headers)
        crowd.ledger.count(f"admin {method} {path.split('?')[0].rpartition('/')[0] or path}", answer.status_code)
        if answer.is_success:
            return True
        crowd.ledger.check_refusal(f"{method} {path}", answer.status_code, answer.headers, answer.json())
        if answer.status_code not in {*_BUSY, *also}:
            crowd.ledger.blame(
                "a change that was refused", f"{method} {path} {body}: {answer.status_code} {answer.text}"
            )
        return False
