"""What the service adds to the engine, how long its clients wait, and whether a flood takes from others.

    python benchmarks/serving_setup.py --tenants 10
    python benchmarks/service_load.py

SmolLM2-135M in bfloat16 with one-bit tenants (`serving_setup.py`), a real `deltakeeper serve` on one thread, and
clients in this process: a bare socket for each request that notes the time of each event and parses nothing else.
Writes `benchmarks/results/service-load.json` after each part; `--only` leaves parts of an earlier run as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import load_fairness
import load_latency
import record
from load_client import Target
from load_overhead import engine_alone, overhead
from service_process import end_on_signal, serving

KV_GIB = 0.5
PARTS = ("overhead", "latency", "fairness")


def main() -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2-135m-instruct"))
    parser.add_argument("--artifacts", type=Path, default=Path("/tmp/peers/tenants/smollm2-135m-instruct"))
    parser.add_argument("--tenants", type=int, default=32, help="asked side by side, a stream each")
    parser.add_argument("--rounds", type=int, default=6, help="of HTTP against the engine alone")
    parser.add_argument("--seconds", type=float, default=60, help="of each loop that measures waiting")
    parser.add_argument("--window", type=float, default=20, help="seconds of a window with or without a flood")
    parser.add_argument("--windows", type=int, default=3, help="pairs of windows")
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--record", default="service-load", help="name of the results")
    arguments = parser.parse_args()
    end_on_signal()
    rows = record.load(arguments.record).get("rows", {})
    parts: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
        "overhead": measure_overhead,
        "latency": measure_latency,
        "fairness": measure_fairness,
    }
    with tempfile.TemporaryDirectory(dir=arguments.artifacts.parent, prefix="service-load-") as folder:
        write_deltas(arguments.artifacts, Path(folder) / "deltas", arguments.tenants)
        for name in arguments.only or PARTS:
            rows[name] = parts[name](arguments, Path(folder)) | {"load_average": os.getloadavg()[0]}
            rows["workload"] = {"threads": arguments.threads, "tenants": arguments.tenants}
            record.save(arguments.record, rows)


def write_deltas(artifacts: Path, folder: Path, count: int) -> None:
    """A folder of tenants; more than there are artifacts are copies, each in memory by itself."""
    made = sorted(artifacts.glob("t*[0-9]"))
    if not made:
        raise SystemExit(f"no tenants are in {artifacts}; run benchmarks/serving_setup.py")
    for number in range(count):
        shutil.copytree(made[number % len(made)], folder / f"t{number}", copy_function=os.link)


def measure_overhead(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The service and the engine alone, each in its process, both in memory all the time."""
    kv_bytes = int(KV_GIB * 2**30)
    with (
        serve(arguments, folder) as service,
        engine_alone(arguments.base, folder / "deltas", kv_bytes, arguments.threads, folder / "engine.log") as engine,
    ):
        target = Target(service.url, {"*": service.make_key(None, "admin", None)})
        return overhead(service, target, engine, tenant_names(arguments), vocabulary(arguments.base), arguments.rounds)


def measure_latency(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A closed loop, and an open one below what the closed one got through."""
    words = vocabulary(arguments.base)
    with serve(arguments, folder) as service:
        admin = service.make_key(None, "admin", None)
        target = Target(service.url, {"*": admin})
        asyncio.run(load_latency.closed_loop(target, tenant_names(arguments), 5, words))  # loads all tenants
        closed = asyncio.run(load_latency.closed_loop(target, tenant_names(arguments), arguments.seconds, words))
        rate = load_latency.PART_OF_SATURATION * closed["requests_s"]
        opened = asyncio.run(
            load_latency.open_loop(target, service.url, admin, tenant_names(arguments), rate, arguments.seconds, words)
        )
    shape = {"prompt": load_latency.PROMPT, "new": load_latency.NEW, "part": load_latency.PART_OF_SATURATION}
    return shape | {"closed": closed, "open": opened}


def measure_fairness(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A flood that quotas refuse, and one that only the engine's fair line meets."""
    pair = load_fairness.Pair("t0", "t1")
    sizes = {
        "seconds": arguments.window,
        "pairs": arguments.windows,
        "vocabulary": vocabulary(arguments.base),
    }
    found: dict[str, Any] = {"side_by_side": load_fairness.SIDE_BY_SIDE, "flood": load_fairness.FLOOD}
    with serve(arguments, folder, "--max-running", load_fairness.RUNNING) as service:
        admin = service.make_key(None, "admin", None)
        keys = {name: service.make_key(admin, name, [name]) for name in (pair.quiet, pair.flooder)}
        target = Target(service.url, keys)
        for name, measure in (("quotas", load_fairness.under_quotas), ("line", load_fairness.without_quotas)):
            found[name] = asyncio.run(measure(target, service.url, admin, pair, **sizes))
    return found


def serve(arguments: argparse.Namespace, folder: Path, *more: object) -> Any:
    """The service over the tenants, with a state of its own each time."""
    state = Path(tempfile.mkdtemp(dir=folder)) / "state.db"
    settings = ("--kv-gib", KV_GIB, "--state", state, *more)
    return serving(arguments.base, folder / "deltas", folder / "service.log", *settings, threads=arguments.threads)


def tenant_names(arguments: argparse.Namespace) -> list[str]:
    """All tenants."""
    return [f"t{number}" for number in range(arguments.tenants)]


def vocabulary(base: Path) -> int:
    """Tokens of the base."""
    return int(json.loads((base / "config.json").read_text())["vocab_size"])


if __name__ == "__main__":
    main()
