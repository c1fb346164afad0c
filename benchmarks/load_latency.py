"""How long clients wait: for the first token and between tokens, while 32 tenants are asked."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx
from load_client import Answer, Target
from load_overhead import PROMPT

NEW = (16, 48)
"""Tokens of an answer, at least and at most, so that answers do not end in step."""
PART_OF_SATURATION = 0.6
COLD = 0.25
"""Share of the open loop's requests before which their tenant is put out of memory."""


class Prompts:
    """Random requests."""

    def __init__(self, seed: int, vocabulary: int) -> None:
        self._draw, self._vocabulary = random.Random(seed), vocabulary

    def next(self) -> tuple[list[int], int]:
        """A prompt, and how long its answer shall be."""
        tokens = [self._draw.randrange(100, self._vocabulary) for _ in range(PROMPT)]
        return tokens, self._draw.randint(*NEW)


async def closed_loop(target: Target, tenants: Sequence[str], seconds: float, vocabulary: int) -> dict[str, Any]:
    """One client for each tenant asks again as soon as it has its answer."""
    end = time.perf_counter() + seconds

    async def client(number: int, tenant: str) -> list[Answer]:
        prompts, answers = Prompts(number, vocabulary), []
        while time.perf_counter() < end:
            answers.append(await target.stream(tenant, *prompts.next()))
        return answers

    began = time.perf_counter()
    answers = [a for own in await asyncio.gather(*(client(i, t) for i, t in enumerate(tenants))) for a in own]
    took = time.perf_counter() - began
    return {"clients": len(tenants), "seconds": took, "requests_s": len(answers) / took} | waits(answers)


async def open_loop(
    target: Target, url: str, admin: str, tenants: Sequence[str], rate: float, seconds: float, vocabulary: int
) -> dict[str, Any]:
    """Requests come by chance, so many a second on average, whether or not others have their answers.

    A tenant that is put out of memory first, which its request then waits for, is apart: cold.
    """
    draw, prompts = random.Random(1), Prompts(1000, vocabulary)
    busy: dict[str, int] = dict.fromkeys(tenants, 0)
    tasks: list[asyncio.Task[Answer]] = []
    end = time.perf_counter() + seconds
    headers = {"Authorization": f"Bearer {admin}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as client:

        async def ask(tenant: str, cold: bool) -> Answer:
            try:
                if cold:
                    (await client.post("/v1/unload_lora_adapter", json={"lora_name": tenant})).raise_for_status()
                answer = await target.stream(tenant, *prompts.next())
                answer.cold = cold
                return answer
            finally:
                busy[tenant] -= 1

        while time.perf_counter() < end:
            await asyncio.sleep(draw.expovariate(rate))
            idle = [tenant for tenant in tenants if not busy[tenant]]
            tenant = draw.choice(idle or tenants)
            cold = bool(idle) and draw.random() < COLD
            busy[tenant] += 1
            tasks.append(asyncio.create_task(ask(tenant, cold)))
        answers = await asyncio.gather(*tasks)
    warm, cold_ones = [a for a in answers if not a.cold], [a for a in answers if a.cold]
    return {"rate": rate, "seconds": seconds, "warm": waits(warm), "cold": waits(cold_ones)}


def waits(answers: Sequence[Answer]) -> dict[str, Any]:
    """Percentiles of what clients waited, in seconds; requests that failed are counted apart."""
    failed = sum(a.status != 200 for a in answers)
    answers = [a for a in answers if a.status == 200]
    gaps = [gap for a in answers for gap in a.gaps_s]
    return {
        "requests": len(answers),
        "failed": failed,
        "tokens": sum(a.tokens for a in answers),
        "events": sum(len(a.events) for a in answers),
        "first_token_s": percentiles([a.first_s for a in answers if a.events]),
        "between_tokens_s": percentiles(gaps),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99, each the smallest value that so many do not exceed."""
    ordered = sorted(values)
    return {f"p{part}": ordered[max(0, -(-part * len(ordered) // 100) - 1)] for part in (50, 95, 99)} if ordered else {}
