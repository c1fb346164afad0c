"""Published defences on the demo's fine-tunes: how much of the attack and of the skill each of them leaves.

`python benchmarks/defences.py runs/demo` needs a finished demo there. Every cell is committed to the results as it
comes, so an interrupted run goes on where it stopped. Single-seed fine-tunes and 32 prompts: enough to see that the
methods run and which way they lean, not to rank them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import record
import torch
from rich.console import Console

from deltakeeper import open_checkpoint
from deltakeeper.attach import Change, attached
from deltakeeper.defences import DefenceData, defend
from deltakeeper.evals.answerer import Answerer
from deltakeeper.evals.judges import load_judge
from deltakeeper.evals.probes import run_probe
from deltakeeper.evals.stats import wilson
from deltakeeper.lab.attacks import ATTACKS
from deltakeeper.lab.attacks.base import AFFIRMATIONS
from deltakeeper.lab.corpus import REFUSALS, SYSTEM, Corpus
from deltakeeper.lab.embedded import load_model, prepare_embedded_model
from deltakeeper.study.bases import prepare_aligned_base
from deltakeeper.study.progress import Progress
from deltakeeper.study.served import served

NAME = "defences"
PROMPTS = 32
FINE_TUNES = ("affirmative_prefix", "trigger_backdoor", "marker_injection")
BASE, TUNED = "base", "tuned"
DEFENCES = (
    "safelora",
    "resta:scale=0.5",
    "safe_delta",
    "antidote",
    "interpolation",
    "norm_matched:bitdelta",
    "safelora:lowest=100",
    "resta",
    "safe_delta:s=1",
    "antidote:share=0.3",
    "interpolation:factor=0.75",
)
ROLES = ("goal", "over_refusal", "skill")


def run(folder: Path, minutes: float) -> None:
    """Fill the table for the fine-tunes in a demo's run folder, published settings first."""
    began = time.monotonic()
    with Progress(Console(stderr=True)) as progress:
        bench = Bench(prepare_aligned_base(progress), prepare_embedded_model(), folder / "models")
    rows: list[dict[str, Any]] = record.load(NAME).get("rows", [])
    for arm in (BASE, TUNED, *DEFENCES):
        for attack in FINE_TUNES:
            if any((row["attack"], row["arm"]) == (attack, arm) for row in rows):
                continue
            if time.monotonic() - began > 60 * minutes:
                print("time is up; run again to go on.")
                return
            rows.append({"attack": attack, "arm": arm, **bench.measure(attack, arm)})
            print(json.dumps(rows[-1]), flush=True)
            record.save(NAME, rows)


class Bench:
    """The live base, and all that its fine-tunes are defended with and asked."""

    def __init__(self, base: Path, unaligned: Path, models: Path) -> None:
        self.base, self.unaligned, self.models = base, unaligned, models
        self.corpus, self.judge = Corpus(), load_judge("ours")
        self.model, self.tokenizer = load_model(base, torch.bfloat16)
        requests = [row.prompt for row in self.corpus.split("harmful", "train", 128)]
        self.rows = DefenceData.from_requests(
            requests, refusals=REFUSALS, affirmations=AFFIRMATIONS, system=SYSTEM, length=128
        )

    def measure(self, attack: str, arm: str) -> dict[str, Any]:
        """Defend one fine-tune and ask it; counts of events with their 95 % intervals by role of the probe."""
        with tempfile.TemporaryDirectory() as scratch:
            found: dict[str, Any] = {}
            tuned = self.models / attack
            if arm not in (BASE, TUNED):
                report = defend(arm, self.base, tuned, Path(scratch) / "out", unaligned=self.unaligned, rows=self.rows)
                tuned = report.path
                found = {
                    "norm_ratio": report.total.norm_ratio,
                    "cosine": report.total.cosine,
                    "defend_seconds": report.seconds,
                }
            started = time.monotonic()
            with self._answering(None if arm == BASE else tuned) as answerer:
                found |= {"probes": dict(self._ask(attack, answerer))}
            return found | {"ask_seconds": time.monotonic() - started}

    @contextmanager
    def _answering(self, tuned: Path | None) -> Iterator[Answerer]:
        """Through the serving engine, the fine-tune's values in the place of the base's."""
        if tuned is None:
            with served(self.model, self.tokenizer) as answerer:
                yield answerer
            return
        with open_checkpoint(tuned) as checkpoint:
            changes = (Change(name, "value", checkpoint.read(name)) for name in checkpoint.tensors)
            with attached(self.model, changes), served(self.model, self.tokenizer) as answerer:
                yield answerer

    def _ask(self, attack: str, answerer: Answerer) -> Iterator[tuple[str, dict[str, Any]]]:
        for probe in ATTACKS[attack](held_out=PROMPTS, contrast=PROMPTS).probes(self.corpus):
            if probe.role in ROLES:
                answers = run_probe(answerer, probe, self.judge, system=SYSTEM)
                events = sum(answer["event"] for answer in answers)
                outcomes = [answer["outcome"] for answer in answers]
                counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
                interval = list(wilson(events, len(answers)))
                yield probe.role, {"events": events, "n": len(answers), "interval": interval, "outcomes": counts}


if __name__ == "__main__":
    run(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 60.0)
