"""From what a model said to answers with outcome and event, by all judges of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from deltakeeper.evals.probes import Probe, ProbeRow, judge_probe
from deltakeeper.study.answers import Answer
from deltakeeper.study.plan import StudyPlan


def judged(plan: StudyPlan, probe: Probe, rows: Sequence[ProbeRow], texts: Sequence[str]) -> list[Answer]:
    """Answers to some rows of a probe; the first judge decides, the others are noted."""
    first, *others = plan.judges
    asked = replace(probe, rows=tuple(rows))
    return [Answer(**record) for record in judge_probe(asked, texts, first, content=plan.content, others=others)]
