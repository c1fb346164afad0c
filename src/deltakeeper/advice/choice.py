"""The choice: the lowest added risk among arms that are shown to keep the skill, or that the run cannot tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from deltakeeper.advice.evidence import CANDIDATES, Evidence
from deltakeeper.advice.gaps import gap_between
from deltakeeper.advice.records import Advice, Arm, Gap, Terms, Verdict
from deltakeeper.advice.wording import LEVEL, cautions, sentence
from deltakeeper.evals.stats import benjamini_hochberg
from deltakeeper.study.cells import Cell
from deltakeeper.study.groups import comparable, group_cells

_ENOUGH: dict[str, Any] = {"more_seeds": None, "more_prompts": None, "more_both": None}


def advise(cells: Iterable[Cell], terms: Terms | None = None) -> Advice:
    """Pick the arm that leaves the least of the attacks and is shown to keep the skill.

    Risk is judged by the worst attack of the families asked for (of all, by default). An arm is advised only if the
    one-sided 95 % bound of its loss of skill is within the terms, and if its risk is lower than that of every other
    such arm, clearly at 5 % after Benjamini-Hochberg over these comparisons. Controls and references never are.

    Args:
        cells: all cells of a run.
        terms: what is asked for.

    Raises:
        RunError: the run lacks a family that is asked for, has no attack, or is malformed.
    """
    evidence = Evidence(group_cells(comparable(cells)[0]), terms or Terms())
    arms = [evidence.arm(variant) for variant in evidence.variants]
    able = sorted((arm for arm in arms if not arm.refused), key=_rank)
    gaps = _gaps(evidence, able)
    tested = {gap.other: gap.q for gap in gaps}
    tied = [arm for arm in able[1:] if tested[arm.variant] >= LEVEL]
    gap = _decisive(gaps, tied)
    front = {arm.variant for arm in _frontier([arm for arm in arms if arm.kind in CANDIDATES])}
    arms = [
        arm.model_copy(update={"frontier": arm.variant in front, "q": tested.get(arm.variant)})
        for arm in sorted(arms, key=lambda arm: (bool(arm.refused), arm.kind not in CANDIDATES, _rank(arm)))
    ]
    verdict: Verdict = "none" if not able else "cannot tell" if tied else "use"
    found = Advice(
        verdict=verdict,
        sentence="",
        pick=able[0].variant if verdict == "use" else None,
        leading=able[0].variant if able else None,
        tied=_smallest_first([able[0], *tied]) if tied else (),
        terms=evidence.terms,
        families=evidence.families,
        attacks=tuple(group.attack for group in evidence.attacks),
        evidence="adaptive" if evidence.terms.adaptive else "non-adaptive",
        gap=gap,
        versus_tuned=_versus_tuned(evidence, able, arms),
        arms=tuple(arms),
    )
    return found.model_copy(update={"sentence": sentence(found), "cautions": cautions(found, evidence)})


def _gaps(evidence: Evidence, able: Sequence[Arm]) -> list[Gap]:
    """The best arm against every other, corrected together."""
    found = [gap_between(evidence, able[0], other, len(able) - 1) for other in able[1:]]
    adjusted = benjamini_hochberg([gap.p for gap in found])
    return [
        gap.model_copy(update={"p": float(f"{gap.p:.4g}"), "q": float(f"{q:.4g}"), **(_ENOUGH if q < LEVEL else {})})
        for gap, q in zip(found, adjusted, strict=True)
    ]


def _decisive(gaps: Sequence[Gap], tied: Sequence[Arm]) -> Gap | None:
    """The gap to the first arm that cannot be told apart, or else to the runner-up."""
    if not gaps:
        return None
    return next((gap for gap in gaps if tied and gap.other == tied[0].variant), gaps[0])


def _versus_tuned(evidence: Evidence, able: Sequence[Arm], arms: Sequence[Arm]) -> Gap | None:
    tuned = next((arm for arm in arms if arm.kind == "tuned" and arm.risk.value is not None), None)
    if not able or tuned is None:
        return None
    found = gap_between(evidence, able[0], tuned, 1)
    rounded = float(f"{found.p:.4g}")
    return found.model_copy(update={"p": rounded, "q": rounded, **(_ENOUGH if found.p < LEVEL else {})})


def _rank(arm: Arm) -> tuple[float, float, float, str]:
    """Lowest risk first; equal risks by loss, then by size, so that no arm is ranked below one that it dominates."""
    risk = float("inf") if arm.risk.value is None else arm.risk.value
    loss = float("inf") if arm.loss.value is None else arm.loss.value
    return risk, loss, float("inf") if arm.bytes is None else arm.bytes, arm.variant


def _frontier(arms: Sequence[Arm]) -> list[Arm]:
    points = [(arm, arm.risk.value, arm.loss.value) for arm in arms]
    known = [(arm, risk, loss) for arm, risk, loss in points if risk is not None and loss is not None]
    return [
        arm
        for arm, risk, loss in known
        if not any(r <= risk and u <= loss and (r < risk or u < loss) for _, r, u in known)
    ]


def _smallest_first(arms: Sequence[Arm]) -> tuple[str, ...]:
    return tuple(arm.variant for arm in sorted(arms, key=lambda a: (a.bytes is None, a.bytes or 0, _rank(a))))
