"""What HTTP costs: the same requests to the service and to the engine alone, in turns."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from load_client import Target
from service_process import ServiceProcess

PROMPT, NEW = 32, 64


class EngineProcess:
    """`load_engine.py`, and rounds of it."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def run(self, tenants: list[str], prompts: list[list[int]], new: int) -> dict[str, Any]:
        """One round: `seconds` and `tokens`."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(json.dumps({"tenants": tenants, "prompts": prompts, "new": new}) + "\n")
        self._child.stdin.flush()
        found: dict[str, Any] = json.loads(self._child.stdout.readline())
        return found


@contextmanager
def engine_alone(base: Path, deltas: Path, kv_bytes: int, threads: int, log: Path) -> Iterator[EngineProcess]:
    """The engine in a process of its own, until the block ends."""
    script = Path(__file__).with_name("load_engine.py")
    command = [sys.executable, script, "--base", base, "--deltas", deltas, "--kv-bytes", kv_bytes, "--threads", threads]
    with log.open("wb") as errors:
        child = subprocess.Popen(
            [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        yield EngineProcess(child)
    finally:
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def draw_prompts(seed: int, count: int, vocabulary: int) -> list[list[int]]:
    """Random tokens, so that no prompt shares a beginning with another."""
    draw = random.Random(seed)
    return [[draw.randrange(100, vocabulary) for _ in range(PROMPT)] for _ in range(count)]


def overhead(
    service: ServiceProcess, target: Target, engine: EngineProcess, tenants: list[str], vocabulary: int, rounds: int
) -> dict[str, Any]:
    """Tokens a second of streams, of whole answers, and of the engine alone, by round; the order turns with the round.

    Every request goes to a tenant of its own and all leave at once. The clock runs from before the first request to
    after the last byte; CPU seconds are those of the service and of its client within that time.
    """
    contests = ("streams", "whole", "engine")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contests}
    for turn in range(-1, rounds):  # the first one loads all tenants, and is not counted
        for at in range(len(contests)):
            name = contests[(turn + at) % len(contests)]
            prompts = draw_prompts(turn, len(tenants), vocabulary)
            if name == "engine":
                alone = engine.run(tenants, prompts, NEW)
                row = {"seconds": alone["seconds"], "tokens": alone["tokens"]}
            else:
                row = _over_http(service, target, tenants, prompts, name)
            row["tokens_s"] = row["tokens"] / row["seconds"]
            print(f"round {turn + 1} | {name} | {row['tokens_s']:.0f} tokens/s", flush=True)
            if turn >= 0:
                found[name].append(row)
    ratios = {
        name: [a["tokens_s"] / b["tokens_s"] for a, b in zip(found[name], found["engine"], strict=True)]
        for name in ("streams", "whole")
    }
    middle = {name: statistics.median(values) for name, values in ratios.items()}
    shape = {"prompt": PROMPT, "new": NEW, "requests": len(tenants), "rounds": rounds}
    return shape | {"contests": found, "ratios": ratios, "median_ratio": middle}


def _over_http(
    service: ServiceProcess, target: Target, tenants: list[str], prompts: list[list[int]], name: str
) -> dict[str, float]:
    ask = target.stream if name == "streams" else target.whole

    async def all_at_once() -> Any:
        return await asyncio.gather(*(ask(t, p, NEW) for t, p in zip(tenants, prompts, strict=True)))

    cpu, own = service.footprint().cpu_s, time.process_time()
    began = time.perf_counter()
    answers = asyncio.run(all_at_once())
    seconds = time.perf_counter() - began
    if bad := [a for a in answers if a.status != 200 or a.tokens != NEW]:
        raise RuntimeError(f"{len(bad)} of {len(answers)} requests failed, the first with status {bad[0].status}.")
    return {
        "seconds": seconds,
        "tokens": float(sum(a.tokens for a in answers)),
        "service_cpu_s": service.footprint().cpu_s - cpu,
        "client_cpu_s": time.process_time() - own,
    }
