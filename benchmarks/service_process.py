"""`deltakeeper serve` as a process of its own on this machine, and what the system says of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 180
STOP_SECONDS = 60


@dataclass(frozen=True)
class Footprint:
    """What a process holds at one moment; memory in MiB."""

    rss_mib: float
    anonymous_mib: float
    threads: int
    files: int
    cpu_s: float


def end_on_signal() -> None:
    """Let SIGTERM end this process in order, so that no service stays behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("it was told to end"))


class ServiceProcess:
    """A service that runs.

    Attributes:
        url: where it is asked.
        log: file of what it says.
    """

    def __init__(self, child: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self._child, self.url, self.log = child, url, log

    def footprint(self) -> Footprint:
        """Memory, threads, open files and CPU time."""
        proc = Path("/proc") / str(self._child.pid)
        fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
        ticks = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]
        return Footprint(
            rss_mib=int(fields["VmRSS"].split()[0]) / 1024,
            anonymous_mib=int(fields["RssAnon"].split()[0]) / 1024,
            threads=int(fields["Threads"]),
            files=len(list((proc / "fd").iterdir())),
            cpu_s=sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
        )

    def stop(self) -> int:
        """Ask it to end, and give its exit status; one that does not end is killed."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
        try:
            return self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return self._child.wait()

    def make_key(self, admin: str | None, name: str, models: list[str] | None) -> str:
        """The secret of a new key; of an admin key where `models` is None."""
        wanted = {"name": name, "role": "admin"} if models is None else {"name": name, "models": models}
        headers = {} if admin is None else {"Authorization": f"Bearer {admin}"}
        answer = httpx.post(f"{self.url}/admin/keys", json=wanted, headers=headers, timeout=60, trust_env=False)
        answer.raise_for_status()
        return str(answer.json()["secret"])


@contextmanager
def serving(base: Path, deltas: Path, log: Path, *arguments: object, threads: int = 1) -> Iterator[ServiceProcess]:
    """A service on a free port of this machine; it is stopped at the end, whatever happens."""
    command = [sys.executable, "-m", "deltakeeper", "serve", "--base", base, "--deltas", deltas, "--port", 0]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as out:
        child = subprocess.Popen(
            [*map(str, [*command, "--threads", threads, *arguments])],
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for the benchmark, which stops it in order
        )
    service = ServiceProcess(child, "", log)
    try:
        end = time.monotonic() + START_SECONDS
        while (found := re.search(r" on (http://\S+)", log.read_text())) is None:
            if child.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the service did not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        service.url = found[1]
        yield service
    finally:
        service.stop()
