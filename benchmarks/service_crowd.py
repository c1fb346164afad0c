"""A crowd of locust's users (service_locust.py) at a service that runs for them, and a record of what they saw.

    pip install locust
    python benchmarks/serving_setup.py --tenants 10
    python benchmarks/service_crowd.py --locust locust

Locust is a program of its own, best in an environment of its own. Writes `benchmarks/results/service-locust.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
from service_load import KV_GIB, write_deltas
from service_process import end_on_signal, serving

USERS_FILE = Path(__file__).with_name("service_locust.py")
PERCENTILES = (50, 95, 99)


def main() -> None:
    """Start the service, let the users in, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2-135m-instruct"))
    parser.add_argument("--artifacts", type=Path, default=Path("/tmp/peers/tenants/smollm2-135m-instruct"))
    parser.add_argument("--tenants", type=int, default=10)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--spawn-rate", type=int, default=4, help="users that come each second")
    parser.add_argument("--seconds", type=int, default=60, help="how long they ask")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--locust", default="locust", help="the program")
    given = parser.parse_args()
    end_on_signal()
    with tempfile.TemporaryDirectory(dir=given.artifacts.parent, prefix="service-crowd-") as name:
        folder = Path(name)
        write_deltas(given.artifacts, folder / "deltas", given.tenants)
        settings = ("--kv-gib", KV_GIB, "--state", folder / "state.db")
        with serving(given.base, folder / "deltas", folder / "log", *settings, threads=given.threads) as service:
            key = service.make_key(None, "admin", None)  # may ask every model
            before = service.footprint()
            entries = crowd(given, service.url, key, folder / "found")
            after = service.footprint()
    work = {
        field: getattr(given, field) for field in ("tenants", "users", "spawn_rate", "seconds", "tokens", "threads")
    }
    rows = {
        "workload": work | {"locust": version(given.locust)},
        "entries": [*told(entries)],
        "service_cpu_s": after.cpu_s - before.cpu_s,
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(rows, indent=1), record.save("service-locust", rows))


def crowd(given: argparse.Namespace, url: str, key: str, found: Path) -> list[dict[str, Any]]:
    """What locust noted, an entry a kind of request; it ends by itself, with an error if any request failed."""
    words = [given.locust, "-f", USERS_FILE, "--headless", "--only-summary", "--host", url, "--json-file", found]
    words += ["-u", given.users, "-r", given.spawn_rate, "-t", f"{given.seconds}s", "--stop-timeout", "60"]
    environment = os.environ | {"DELTAKEEPER_KEY": key, "DELTAKEEPER_TOKENS": str(given.tokens)}
    environment.pop("PYTHONPATH", None)  # its environment is not ours
    done = subprocess.run([*map(str, words)], env=environment, timeout=given.seconds + 180, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"locust ended with {done.returncode}; see what it says above.")
    entries: list[dict[str, Any]] = json.loads(found.with_suffix(".json").read_text())  # locust adds the ending
    return entries


def told(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each entry its name, counts, and percentiles in seconds as locust has rounded them."""
    for entry in sorted(entries, key=lambda entry: (entry["method"], entry["name"])):
        times = {float(time): int(count) for time, count in entry["response_times"].items()}
        yield {
            "method": entry["method"],
            "name": entry["name"],
            "requests": entry["num_requests"],
            "failed": entry["num_failures"],
            "seconds": {f"p{part}": percentile(times, part) / 1000 for part in PERCENTILES},
        }


def percentile(times: dict[float, int], part: int) -> float:
    """The least of these times that `part` hundredths of all do not exceed; 0 where there are none."""
    seen, wanted = 0, sum(times.values()) * part / 100
    for time in sorted(times):
        seen += times[time]
        if seen >= wanted:
            return time
    return 0.0


def version(locust: str) -> str:
    """Locust's version."""
    said = subprocess.run([locust, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[1]


if __name__ == "__main__":
    main()
