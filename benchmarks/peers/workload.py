"""What every peer of the serving benchmark runs: the same prompts, the same number of new tokens, the same clock.

It imports nothing but the standard library, so that it runs in each peer's own environment.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

Prompts = list[list[int]]
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Workload:
    """One contest of one peer.

    Attributes:
        mode: what the peer does; each peer names its own modes.
        model: folder of the base model.
        peers: folder with tenants, adapters and whatever else the peers need.
        batch: requests that are handed over at once.
        tenants: different tenants among them; 0 means the base alone.
        prompt: tokens of each prompt.
        new: new tokens of each request; the end-of-text token does not end it.
        repeats: how often it is timed, after one warm-up.
        threads: threads of the products.
    """

    mode: str
    model: Path
    peers: Path
    batch: int
    tenants: int
    prompt: int
    new: int
    repeats: int
    threads: int

    @property
    def tenant_of(self) -> list[int]:
        """Tenant of each request; the requests of one stand side by side."""
        return [i * self.tenants // self.batch for i in range(self.batch)]

    def prompts(self, seed: int) -> Prompts:
        """Random tokens, so that no prompt shares a prefix with another."""
        vocabulary = json.loads((self.model / "config.json").read_text())["vocab_size"]
        draw = random.Random(seed)
        return [[draw.randrange(100, vocabulary) for _ in range(self.prompt)] for _ in range(self.batch)]


def parse(modes: tuple[str, ...]) -> Workload:
    """The workload that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=modes, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    for name, default in (("batch", 1), ("tenants", 0), ("prompt", 32), ("new", 64), ("repeats", 2), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return Workload(**vars(parser.parse_args()))


def measure(work: Workload, run: Callable[[Prompts, int], int], finish: Callable[[], float] | None = None) -> list[Any]:
    """Time `run(prompts, new)`, which returns how many new tokens it made: to the first token, and to the last.

    Args:
        work: the workload.
        run: the peer's own call.
        finish: seconds of the last call that are not generation, where there are any.
    """
    run(work.prompts(0), min(work.new, WARM_UP_TOKENS))
    samples = []
    for turn in range(work.repeats):
        sample = {}
        for field, new, seed in (("first_token_s", 1, 2 * turn + 1), ("seconds", work.new, 2 * turn + 2)):
            prompts = work.prompts(seed)
            started = time.perf_counter()
            made = run(prompts, new)
            sample[field] = time.perf_counter() - started - (finish() if finish else 0.0)
            if made != work.batch * new:
                raise SystemExit(f"{made} new tokens came back instead of {work.batch * new}")
        samples.append(sample)
    return samples


def report(work: Workload, samples: list[Any], versions: dict[str, str], **more: Any) -> None:
    """Print the one line of JSON that the runner reads.

    Args:
        work: the workload.
        samples: for each repeat `seconds` of the whole call and `first_token_s` of the same with one new token.
        versions: packages and their versions.
        more: what else there is to say, such as memory.
    """
    made = work.batch * work.new
    seconds = statistics.median(s["seconds"] for s in samples)
    first = statistics.median(s["first_token_s"] for s in samples)
    found = {
        "samples": samples,
        "tokens_s": made / seconds,
        "first_token_s": first,
        "prefill_tokens_s": work.batch * work.prompt / first,
        "decode_tokens_s": (made - work.batch) / (seconds - first) if seconds > first else None,
        "versions": versions,
    }
    _answer(found | more)


def absent(reason: str) -> NoReturn:
    """Say that this peer cannot run here, and why."""
    _answer({"absent": reason})
    raise SystemExit(0)


def memory() -> dict[str, float]:
    """Resident memory of this process and its children now and at its peak, in MiB."""
    sums = {"VmRSS": 0, "RssAnon": 0, "VmHWM": 0}
    for pid in _family():
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:  # it has ended meanwhile
            continue
        for line in lines:
            field, _, value = line.partition(":")
            if field in sums:
                sums[field] += int(value.split()[0])
    names = {"VmRSS": "rss_mib", "RssAnon": "rss_anon_mib", "VmHWM": "peak_rss_mib"}
    return {names[field]: round(kib / 1024, 1) for field, kib in sums.items()}


def _family() -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # the name in brackets may hold spaces; the parent is the second field after it
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    family = [os.getpid()]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    return family


def _answer(found: dict[str, Any]) -> None:
    sys.stdout.flush()
    print("\n" + json.dumps(found), flush=True)
