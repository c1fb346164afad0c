"""Cells out of answers that are there already: other judges look at them, and no model is asked."""

from __future__ import annotations

from dataclasses import replace

from deltakeeper.evals.probes import Probe
from deltakeeper.study.cell_file import CellFile, answer_line
from deltakeeper.study.plan import StudyPlan
from deltakeeper.study.store import RunStore
from deltakeeper.study.verdicts import judged


def known_answers(store: RunStore) -> dict[str, str]:
    """Keys of finished cells, by what was asked in them, whoever judged it."""
    found: dict[str, str] = {}
    for key in store.cell_keys():
        file = store.cell_file(key)
        if file.header is not None and file.complete:
            found.setdefault(file.header.asked, key)
    return found


def rejudge(plan: StudyPlan, probes: dict[str, Probe], source: CellFile, target: CellFile, key: str) -> None:
    """Write the cell `key` with the answers of `source` and the verdicts of the plan's judges."""
    header = source.header
    assert header is not None
    target.begin(replace(header, key=key))
    for number, (unit, span) in enumerate(zip(header.units(), source.spans(), strict=True)):
        lines = source.lines[span]
        if number < target.units_done:
            continue
        if unit.part != "probe":
            target.append(lines)
            continue
        probe = probes[unit.name]
        rows = probe.rows[unit.start : unit.start + len(lines)]
        answers = judged(plan, probe, rows, [str(line["answer"]) for line in lines])
        target.append([answer_line(unit.name, answer) for answer in answers])
