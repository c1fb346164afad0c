"""Commit what the lens saw of a study: its summary without the curves, and the figures that docs/lens.md shows.

    deltakeeper report runs/lens
    python benchmarks/lens_results.py runs/lens

Writes `benchmarks/results/lens-inside.json`, which docs/results.md is made from, and copies the figures of the report
into `docs/figures`. Curves by layer stay in the run folder, in `lens-summary.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import record

from deltakeeper.study.lens_records import LENS_SUMMARY_NAME
from deltakeeper.study.store import RunStore

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
SHOWN = ("kept-by-size.svg", "*-map.svg", "*-departure.svg")


def main() -> None:
    """Read a run folder and write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder with a report")
    given = parser.parse_args()
    found = json.loads((given.run / LENS_SUMMARY_NAME).read_text(encoding="utf-8"))
    for attack in found["attacks"]:
        for arm in attack["arms"]:
            del arm["lines"]
    found["machines"] = [line["machine"] for line in RunStore(given.run).read_times() if "machine" in line][-1:]
    found["date"] = [line["date"] for line in RunStore(given.run).read_times() if "date" in line][-1]
    scratch = record.RESULTS / ".lens-inside.json"
    scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    scratch.rename(record.RESULTS / "lens-inside.json")
    FIGURES.mkdir(exist_ok=True)
    for pattern in SHOWN:
        for figure in sorted((given.run / "lens" / "figures").glob(pattern)):
            shutil.copyfile(figure, FIGURES / f"lens-{figure.name}")


if __name__ == "__main__":
    main()
