"""Commit what a study measured: its summary, and the events of every prompt of every cell, without the answers' text.

    python benchmarks/study_results.py runs/embedded embedded

Writes `benchmarks/results/<name>-summary.json`, which docs/results.md is made from, and `<name>-events.jsonl`, a line a
cell: what was asked, on which machine cells of the run were measured, and for each probe a 1 where its event happened,
prompts in the order of their ids. Answers to harmful prompts stay in the run folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import record

from deltakeeper.study.cells import Cell
from deltakeeper.study.store import RunStore
from deltakeeper.study.summarising import summarise


def line_of(cell: Cell) -> str:
    """One cell as a line of JSON."""
    probes = {}
    for name, probe in sorted(cell.probes.items()):
        answers = sorted(probe.answers, key=lambda answer: answer.id)
        probes[name] = {
            "role": probe.role,
            "event": probe.event,
            "events": "".join("1" if answer.event else "0" for answer in answers),
            "incoherent": sum(answer.outcome == "incoherent" for answer in answers),
        }
    told = {"attack": cell.attack, "seed": cell.seed, "arm": cell.variant, "kind": cell.kind, "bytes": cell.bytes}
    return json.dumps(told | {"probes": probes}, sort_keys=True)


def main() -> None:
    """Read a run folder and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of a study, finished or not")
    parser.add_argument("name", help="what the results are called")
    given = parser.parse_args()
    store = RunStore(given.run)
    cells = sorted(store.read_cells(), key=lambda cell: (cell.attack, cell.variant, cell.seed))
    machines = [line["machine"] for line in store.read_times() if "machine" in line]
    distinct = [json.loads(text) for text in dict.fromkeys(json.dumps(machine) for machine in machines)]
    head = json.dumps({"run": str(given.run), "cells": len(cells), "machines": distinct}, sort_keys=True)
    summary = summarise(cells, store.read_run()).to_text()
    for file, text in (
        (f"{given.name}-summary.json", summary),
        (f"{given.name}-events.jsonl", "\n".join([head, *map(line_of, cells)]) + "\n"),
    ):
        scratch = record.RESULTS / f".{file}"
        scratch.write_text(text, encoding="utf-8")
        scratch.rename(record.RESULTS / file)


if __name__ == "__main__":
    main()
