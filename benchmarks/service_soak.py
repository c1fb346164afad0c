"""An hour of everything at once: does the service leak, mix tenants up, or fail?

    python benchmarks/service_soak.py --minutes 60

A real `deltakeeper serve` with a policy and a canary, a tiny bfloat16 base, 64 fine-tunes of it in four codecs and room
in memory for a third of them. Clients with a key for one tenant each ask chats and completions, whole and streamed, go
away half-way, use foreign keys and send what is no request; administrators replace, unload, load, remove and bring back
deltas. What each tenant says was recorded before, one request at a time; every answer, and every piece of one, is held
to that. Writes `benchmarks/results/service-soak.json`; SIGTERM ends it in order, and then nothing is recorded.

What counts as flat was set before anything was measured: the median of the memory's samples in the last sixth of the
time against that in the second sixth (of an hour: the last ten minutes against minutes 10 to 20), within 3 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import record
from prometheus_client.parser import text_string_to_metric_families
from service_process import ServiceProcess, end_on_signal, serving
from soak_admins import Administrators
from soak_crowd import Book, Crowd, Standing
from soak_ledger import Ledger
from soak_tenants import payload_bytes, write_tenants

EARLY, LATE = (1 / 6, 1 / 3), (5 / 6, 1.0)
FLAT = 0.03
MORE_FILES, MORE_THREADS = 2, 4
"""More open files and threads than at the first rest that are still none lost: pools of threads shrink when idle."""
RESTS = 6
SAMPLE_SECONDS = 10
LIMITED = 4
"""Tenants whose keys may make one request at a time, and ten in a minute."""


def main() -> None:
    """Run it, and record what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--tenants", type=int, default=64)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--admins", type=int, default=3)
    parser.add_argument("--think", type=float, default=0.6, help="mean seconds between two requests of a client")
    parser.add_argument("--folder", type=Path, help="where everything is written; a new one by default")
    parser.add_argument("--record", default="service-soak", help="name of the results")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"everything is written into {folder}", flush=True)
    end_on_signal()
    names = write_tenants(folder, arguments.tenants)
    held = payload_bytes(folder, names)
    limits = ("--policy", folder / "policy.yaml", "--kv-gib", 1 / 1024, "--deltas-gib", held / 3 / 2**30)
    with serving(folder / "base", folder / "deltas", folder / "service.log", *limits) as service:
        found = asyncio.run(soak(arguments, service, folder, names))
        found["exit_status"] = service.stop()
    found["log"] = read_log(service.log, found.pop("secrets"))
    found["workload"] |= {"artifact_bytes": held, "budget_bytes": held // 3}
    found["passed"] = verdicts(found)
    print(json.dumps({key: found[key] for key in ("memory", "faults", "told", "log", "passed")}, indent=1))
    if found["complete"]:
        record.save(arguments.record, found)
    raise SystemExit(0 if found["complete"] and all(found["passed"].values()) else 1)


async def soak(
    arguments: argparse.Namespace, service: ServiceProcess, folder: Path, names: list[str]
) -> dict[str, Any]:
    """Prepare keys and known answers, let the crowd in, and watch."""
    swings = {f"swing{i}": (names[2 * i], names[2 * i + 1]) for i in range(8)}
    guests = {f"guest{i}": names[16 + i] for i in range(4)}
    admin = service.make_key(None, "admin", None)
    keys = {name: service.make_key(admin, name, [name]) for name in (*names, *swings, *guests)}
    headers = {"Authorization": f"Bearer {admin}"}
    limited = frozenset(names[-LIMITED:])
    book = Book()
    with httpx.Client(base_url=service.url, headers=headers, timeout=120, trust_env=False) as alone:
        for name, (first, _) in swings.items():
            alone.put(f"/admin/deltas/{name}", json={"path": first, "load": False}).raise_for_status()
        book.record(alone, ["base", *names])
        ids = {key["name"]: key["id"] for key in alone.get("/admin/keys").json()["data"]}
        for name in limited:
            quota = {"concurrent": 1, "requests_per_minute": 10}
            alone.put(f"/admin/quotas/key/{ids[name]}", json=quota).raise_for_status()
    standings = {name: Standing(name) for name in ("base", *names)}
    standings |= {name: Standing(first) for name, (first, _) in swings.items()}
    standings |= {name: Standing(None) for name in guests}
    crowd = Crowd(service.url, admin, keys, standings, book, Ledger(), arguments.think, limited)
    residents = [name for name in names if name not in limited]
    administrators = Administrators(crowd, swings, guests, residents)
    watch = Watch(service, crowd, folder / "progress.jsonl", arguments.minutes * 60)
    tasks = [asyncio.create_task(crowd.visit(number)) for number in range(arguments.clients)]
    tasks += [asyncio.create_task(administrators.work(number)) for number in range(arguments.admins)]
    complete = await watch.run()
    crowd.ended = True
    crowd.open.set()
    await asyncio.gather(*tasks)
    await crowd.client.aclose()
    ledger = crowd.ledger
    return {
        "workload": {k: getattr(arguments, k) for k in ("minutes", "tenants", "clients", "admins", "think")}
        | {"known_answers": book.size},
        "complete": complete,
        "requests": dict(sorted(ledger.requests.items())),
        "faults": dict(ledger.faults),
        "told": ledger.told,
        "memory": watch.memory(),
        "rests": watch.rests,
        "minutes": watch.minutes(),
        "secrets": [admin, *keys.values()],
    }


class Watch:
    """Samples the process, lets the crowd rest at times to see that nothing is held, and writes it all down.

    Attributes:
        samples: what the process held, each `SAMPLE_SECONDS`.
        rests: what the service held while nobody asked.
    """

    def __init__(self, service: ServiceProcess, crowd: Crowd, progress: Path, seconds: float) -> None:
        self._service, self._crowd, self._progress, self._seconds = service, crowd, progress, seconds
        self.samples: list[dict[str, float]] = []
        self.rests: list[dict[str, Any]] = []

    async def run(self) -> bool:
        """Until the time is over or a signal comes; whether it was the time."""
        stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        ledger, pause = self._crowd.ledger, self._seconds / RESTS
        ledger.began = time.monotonic()
        self._crowd.open.set()
        while not stopped.is_set() and ledger.seconds < self._seconds:
            with suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), min(SAMPLE_SECONDS, self._seconds / 18))
            self._sample()
            if ledger.seconds >= pause * (len(self.rests) + 1):
                await self._rest()
        if len(self.rests) < RESTS:
            await self._rest()
        return not stopped.is_set()

    def memory(self) -> dict[str, Any]:
        """Medians of the two windows, and the slope of a straight line from the early one on."""
        found: dict[str, Any] = {}
        for field in ("rss_mib", "anonymous_mib"):
            early, late = (
                [s[field] for s in self.samples if a <= s["seconds"] / self._seconds <= b] for a, b in (EARLY, LATE)
            )
            if not early or not late:
                continue
            first, last = statistics.median(early), statistics.median(late)
            later = [s for s in self.samples if s["seconds"] >= EARLY[0] * self._seconds]
            line = statistics.linear_regression([s["seconds"] / 3600 for s in later], [s[field] for s in later])
            found[field] = {"early": first, "late": last, "growth": last / first - 1, "mib_per_hour": line.slope}
        return found

    def minutes(self) -> list[dict[str, float]]:
        """The last sample of each minute; all of them are in the file of the progress."""
        last = {int(sample["seconds"] // 60): sample for sample in self.samples}
        return list(last.values())

    def _sample(self) -> None:
        counts = {"requests": self._crowd.ledger.requests.total(), "faults": self._crowd.ledger.faults.total()}
        self.samples.append(
            {"seconds": round(self._crowd.ledger.seconds, 1)} | asdict(self._service.footprint()) | counts
        )
        self._write("sample", self.samples[-1])

    async def _rest(self) -> None:
        crowd = self._crowd
        await crowd.rest()
        headers = {"Authorization": f"Bearer {crowd.admin}"}
        end = time.monotonic() + 30
        async with httpx.AsyncClient(base_url=crowd.url, headers=headers, timeout=60, trust_env=False) as client:
            while True:
                status = (await client.get("/admin/status")).json()
                deltas = (await client.get("/admin/deltas")).json()
                scraped = _scraped((await client.get("/metrics")).text)
                found = at_rest(status, deltas, scraped)
                if not found["held"] or time.monotonic() > end:
                    break
                await asyncio.sleep(0.5)
        await asyncio.sleep(1)  # connections are closed by now, and their files with them
        found |= {"seconds": round(crowd.ledger.seconds, 1)} | asdict(self._service.footprint())
        self.rests.append(found)
        self._write("rest", found | {"faults": dict(crowd.ledger.faults), "told": crowd.ledger.told[-5:]})
        crowd.open.set()

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        with self._progress.open("a") as file:
            file.write(json.dumps({"kind": kind, **row}) + "\n")


def at_rest(status: dict[str, Any], deltas: dict[str, Any], scraped: dict[str, float]) -> dict[str, Any]:
    """What is held while nobody asks; `held` is what should be nothing, `unlike` where two counts differ."""
    engine, store = status["engine"], status["deltas"]
    held = {
        "running": engine["running"],
        "waiting": engine["waiting"],
        "kv_blocks_used": engine["kv_blocks_used"],
        "pins": store["pins"],
        "reserved_bytes": store["reserved_bytes"],
        "loads_waiting": store["waiting"],
        "pins of tenants": sum(one["pins"] for one in deltas["data"]),
        "kv_cache_usage_perc": scraped["vllm:kv_cache_usage_perc"],
        "failed_steps": engine["failed_steps"],
    }
    told = {
        "/admin/status": store["resident_bytes"],
        "/admin/deltas": deltas["resident_bytes"],
        "tenants together": sum(one["resident_bytes"] for one in deltas["data"]),
        "/metrics": scraped["deltakeeper_delta_resident_bytes memory"],
    }
    return {
        "held": {name: value for name, value in held.items() if value},
        "unlike": told if len(set(told.values())) > 1 else {},
        "resident_bytes": store["resident_bytes"],
        "over_budget": max(0, store["resident_bytes"] - store["byte_budget"]),
        "loads": store["loads"],
        "evictions": store["evictions"],
        "kv_blocks": engine["kv_blocks"],
        "preemptions": engine["preemptions"],
        "answer_tokens": engine["answer_tokens"],
    }


def _scraped(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            tier = sample.labels.get("tier")
            found[sample.name if tier is None else f"{sample.name} {tier}"] = sample.value
    return found


def read_log(log: Path, secrets: list[str]) -> dict[str, Any]:
    """What the service wrote beside a line for each request: failures, and secrets, of which there must be none."""
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if " INFO request " not in line]
    kinds = Counter(line.split()[2] for line in lines if len(line.split()) > 2 and line[:2] == "20")
    return {
        "lines": len(text.splitlines()),
        "by_level": dict(kinds),
        "tracebacks": text.count("Traceback (most recent call last)"),
        "secrets": sum(secret in text for secret in secrets),
        "errors": [line[:300] for line in lines if " ERROR " in line][:20],
    }


def verdicts(found: dict[str, Any]) -> dict[str, bool]:
    """What had to hold, and whether it did."""
    rests, memory = found["rests"], found["memory"].get("rss_mib")
    first, last = rests[0], rests[-1]
    return {
        "no fault of any kind": not found["faults"],
        "no 500": not any("status 5" in kind for kind in found["faults"]),
        "no token of another tenant": "cross-tenant" not in found["faults"],
        "memory is flat": memory is not None and memory["growth"] <= FLAT,
        "open files are flat": last["files"] <= first["files"] + MORE_FILES,
        "threads are flat": last["threads"] <= first["threads"] + MORE_THREADS,
        "nothing is held at rest": not any(rest["held"] for rest in rests),
        "all counts of bytes agree": not any(rest["unlike"] or rest["over_budget"] for rest in rests),
        "deltas had to make room": last["evictions"].get("room", 0) > 0,
        "no traceback and no secret in the log": not found["log"]["tracebacks"] and not found["log"]["secrets"],
        "it ended in order": found["exit_status"] == 0,
    }


if __name__ == "__main__":
    main()
