"""Whether a tenant keeps its share while another floods, in windows that take turns with windows without a flood."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import httpx
from load_client import Answer, Target
from load_latency import Prompts, percentiles

SIDE_BY_SIDE = 4
FLOOD = 10
RUNNING = 2 * SIDE_BY_SIDE
"""What the engine computes side by side: exactly what both tenants have in flight when neither floods."""
GOAL = 0.8
SETTLE_SECONDS = 3.0
"""At the start of a window, not counted: answers of the window before are still under way."""


@dataclass(frozen=True)
class Pair:
    """Two tenants, and their numbers in one window."""

    quiet: str
    flooder: str


async def under_quotas(target: Target, url: str, admin: str, pair: Pair, **sizes: Any) -> dict[str, Any]:
    """Both keys may have four requests at a time; the flooder asks ten times as often as it is let in."""
    await _set_quotas(url, admin, pair, {"concurrent": SIDE_BY_SIDE})

    async def flood(answers: list[Answer], prompts: Prompts, end: float, rate: float) -> None:
        async with asyncio.TaskGroup() as group:

            async def ask() -> None:
                answers.append(await target.stream(pair.flooder, *prompts.next()))

            while time.perf_counter() < end:
                group.create_task(ask())
                await asyncio.sleep(1 / (FLOOD * rate))

    return await _windows(target, pair, flood, **sizes)


async def without_quotas(target: Target, url: str, admin: str, pair: Pair, **sizes: Any) -> dict[str, Any]:
    """Nothing but the engine's fair line: the flooder has forty requests in flight for four of the other."""
    await _set_quotas(url, admin, pair, None)

    async def flood(answers: list[Answer], prompts: Prompts, end: float, rate: float) -> None:
        clients = (_closed(target, pair.flooder, prompts, end, answers) for _ in range(FLOOD * SIDE_BY_SIDE))
        await asyncio.gather(*clients)

    return await _windows(target, pair, flood, **sizes)


Flood = Callable[[list[Answer], Prompts, float, float], Coroutine[Any, Any, None]]


async def _windows(
    target: Target, pair: Pair, flood: Flood, *, seconds: float, pairs: int, vocabulary: int
) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    rate = 1.0
    for number in range(2 * pairs):
        flooded = number % 2 == 1
        began = time.perf_counter()
        end = began + SETTLE_SECONDS + seconds
        quiet: list[Answer] = []
        other: list[Answer] = []
        theirs = Prompts(100 * number + 1, vocabulary)
        calm = [_closed(target, pair.quiet, Prompts(100 * number, vocabulary), end, quiet) for _ in range(SIDE_BY_SIDE)]
        if flooded:
            await asyncio.gather(*calm, flood(other, theirs, end, rate))
        else:
            clients = [_closed(target, pair.flooder, theirs, end, other) for _ in range(SIDE_BY_SIDE)]
            await asyncio.gather(*calm, *clients)
            rate = sum(a.status == 200 for a in other) / (time.perf_counter() - began)
        found.append({"flooded": flooded, **_count(quiet, other, began + SETTLE_SECONDS, end)})
        print(f"window {number + 1} | flooded {flooded} | {found[-1]['quiet_tokens_s']:.1f} tokens/s", flush=True)
    return {"windows": found} | share(found)


def share(windows: list[dict[str, Any]]) -> dict[str, Any]:
    """The quiet tenant's throughput in each flooded window over that of the calm one before it."""
    calm, flooded = ([w for w in windows if w["flooded"] is kind] for kind in (False, True))
    ratios = [b["quiet_tokens_s"] / a["quiet_tokens_s"] for a, b in zip(calm, flooded, strict=True)]
    return {"ratios": ratios, "median_ratio": statistics.median(ratios), "kept": min(ratios) >= GOAL}


def _count(quiet: list[Answer], other: list[Answer], began: float, end: float) -> dict[str, Any]:
    """Tokens that came within a window, and all requests by status; a place is free a moment after its answer ended."""

    def rate(answers: list[Answer]) -> float:
        return sum(began <= at < end for a in answers for at in a.events) / (end - began)

    def statuses(answers: list[Answer]) -> dict[str, int]:
        return dict(Counter(str(answer.status) for answer in answers))

    return {
        "seconds": end - began,
        "quiet_tokens_s": rate(quiet),
        "other_tokens_s": rate([a for a in other if a.status == 200]),
        "quiet_first_token_s": percentiles([a.first_s for a in quiet if a.events and began <= a.sent < end]),
        "other_asked": len(other),
        "quiet_statuses": statuses(quiet),
        "other_statuses": statuses(other),
    }


async def _closed(target: Target, tenant: str, prompts: Prompts, end: float, answers: list[Answer]) -> None:
    while time.perf_counter() < end:
        answers.append(await target.stream(tenant, *prompts.next()))
        if answers[-1].status != 200:
            await asyncio.sleep(0.02)


async def _set_quotas(url: str, admin: str, pair: Pair, limits: dict[str, int] | None) -> None:
    headers = {"Authorization": f"Bearer {admin}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
        for key in (await client.get("/admin/keys")).json()["data"]:
            if key["name"] not in (pair.quiet, pair.flooder):
                continue
            place = f"/admin/quotas/key/{key['id']}"
            if limits is None:
                await client.delete(place)
            else:
                (await client.put(place, json=limits)).raise_for_status()
