"""How long the lens takes of twelve variants together, beside twelve passes of their own.

    python benchmarks/lens_speed.py BASE DELTA... --prompts 64 --commands

Together: base and deltas in one process, the base traced once, every variant measured against it. Apart, in memory: the
base and one variant at a time, since divergences need both distributions; and twelve times a model alone, of which
nothing is known beside the others. Apart, as commands: a process each, as long as it lives. Rounds are interleaved and
their medians kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record

from deltakeeper.artifact import open_artifact
from deltakeeper.lab.corpus import SYSTEM, Corpus
from deltakeeper.lens import Variants
from deltakeeper.lens.tracing import trace_prompts
from deltakeeper.live_base import LiveBase, open_base

PRODUCE = 2


def trace(live: LiveBase, deltas: Sequence[Path], prompts: Sequence[str], **how: Any) -> float:
    """Seconds of tracing the base and some deltas together."""
    artifacts = {f"delta-{number}": open_artifact(path) for number, path in enumerate(deltas)}
    started = time.perf_counter()
    with Variants(live.model, artifacts) as variants:
        trace_prompts(variants, live.tokenizer, prompts, system=SYSTEM, produce=PRODUCE, **how)
    return time.perf_counter() - started


def command(base: Path, deltas: Sequence[Path], asked: Path) -> float:
    """Seconds of `deltakeeper lens` from its start to its end."""
    given = [word for number, path in enumerate(deltas) for word in ("--delta", f"d{number}={path}")]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, "-m", "deltakeeper", "lens", str(base), *given, "--prompts", str(asked), "-o", out]
        subprocess.run([*words, "--system", SYSTEM, "--produce", str(PRODUCE)], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("deltas", type=Path, nargs="+", help="artifacts of fine-tunes of the base")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--commands", action="store_true", help="also a process for each")
    given = parser.parse_args()
    live = open_base(given.base)
    texts = [row.prompt for row in Corpus().split("harmful", "heldout", given.prompts)]
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "asked.jsonl"
        asked.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        for _ in range(given.rounds):
            for what, seconds in {
                "together": lambda: trace(live, given.deltas, texts),
                "apart: base and one": lambda: sum(trace(live, [one], texts) for one in given.deltas),
                "apart: one alone": lambda: sum(trace(live, [], texts) for _ in given.deltas),
            }.items():
                times.setdefault(what, []).append(seconds())
            for what, groups in (
                ("together, a command", [given.deltas]),
                ("apart, commands", [[d] for d in given.deltas]),
            ):
                if given.commands:
                    times.setdefault(what, []).append(sum(command(given.base, some, asked) for some in groups))
    medians = {what: statistics.median(found) for what, found in times.items()}
    found = []
    for what, seconds in medians.items():
        together = "together, a command" if "command" in what else "together"
        found.append({"what": what, "seconds": round(seconds, 2), "share": round(medians[together] / seconds, 3)})
    record.save("lens-speed", {"variants": len(given.deltas), "prompts": len(texts), "times": found})


if __name__ == "__main__":
    main()
