"""What compressing a delta costs in utility: benchmarks on the embedded model.

    python benchmarks/utility.py --tuned runs/demo/models/benign --data ../shared/data

The aligned base, the fine-tune, and its delta in several codecs, on fixed samples; losses against the fine-tune.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import record
import torch
from rich.console import Console

from deltakeeper import compress
from deltakeeper.evals.utility import ItemRecord, ask, compare, prepared, summarise
from deltakeeper.evals.utility.tasks import TaskSource
from deltakeeper.live_base import LiveBase, open_base
from deltakeeper.study.bases import prepare_aligned_base
from deltakeeper.study.progress import Progress
from deltakeeper.study.scorer import scoring

FOLDERS = {"piqa": "piqa", "mmlu": "mmlu", "truthfulqa": "truthfulqa", "text": "wikitext-2", "gsm8k": "gsm8k"}
SIZES = {"piqa": 50, "mmlu": 50, "truthfulqa": 4, "text": 6, "gsm8k": 4}
CODECS = ("bitdelta", "magnitude:keep=0.1")


def main() -> None:
    """Run what the arguments name and write `results/utility.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", type=Path, required=True, help="fine-tune of the aligned base")
    parser.add_argument("--data", type=Path, required=True, help="folder with the folders of the benchmarks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with Progress(Console(stderr=True)) as progress:
        base = prepare_aligned_base(progress)
    with tempfile.TemporaryDirectory() as name:
        deltas = {codec: Path(name) / str(i) for i, codec in enumerate(CODECS)}
        for codec, folder in deltas.items():
            compress(base, arguments.tuned, folder, codec)
        rows = scores(open_base(base), open_base(arguments.tuned), deltas, arguments.data, str(arguments.tuned))
    print(record.save("utility", rows))


def scores(live: LiveBase, tuned: LiveBase, deltas: dict[str, Path], data: Path, name: str) -> dict[str, Any]:
    """Scores of all arms and losses against the fine-tune."""
    records: dict[str, list[ItemRecord]] = {"base": [], "tuned": [], **{codec: [] for codec in deltas}}
    tenants = {f"t{i}": codec for i, codec in enumerate(deltas)}
    artifacts = live.artifacts({tenant: str(deltas[codec]) for tenant, codec in tenants.items()})
    facts = []
    for task, size in SIZES.items():
        with prepared([TaskSource(task, data / FOLDERS[task])], samples=size) as tasks:
            facts += [f.to_json() | {"sources": sorted(f.sources.values())} for f in tasks.facts]
            with scoring(live.model, live.tokenizer, artifacts) as (scorer,):
                for row in ask(tasks, scorer):
                    records[tenants.get(row.arm, "base")].append(row)
            with scoring(tuned.model, tuned.tokenizer, {}) as (scorer,):
                records["tuned"] += ask(tasks, scorer)
        print(task, flush=True)
    return {
        "fine_tune": name,
        "tasks": facts,
        "scores": {
            arm: [
                {**s.measure._asdict(), "n": s.n, "value": s.score.value, "interval": [s.score.low, s.score.high]}
                for s in summarise(own)
            ]
            for arm, own in records.items()
        },
        "losses": {
            arm: [
                {**c.measure._asdict(), "loss": c.loss, "bound": c.bound, "lost": c.lost, "gained": c.gained, "p": c.p}
                for c in compare(records["tuned"], own)
            ]
            for arm, own in records.items()
            if arm != "tuned"
        },
    }


if __name__ == "__main__":
    main()
