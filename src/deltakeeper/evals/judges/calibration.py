"""How far a judge can be trusted: against people's labels, arm by arm, and rates corrected for its errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deltakeeper.errors import DataError
from deltakeeper.evals.judges.base import Judge, Seen, events_of
from deltakeeper.evals.judges.labelled import LabelledAnswer
from deltakeeper.evals.judges.panel import Panel, judge_answers
from deltakeeper.evals.outcomes import gate
from deltakeeper.evals.stats import (
    RESAMPLES,
    Estimate,
    JudgedArm,
    JudgeQuality,
    LabelledSet,
    corrected_estimate,
    quality,
    wilson,
)

ALL = "all"
"""Name of what is measured over all arms together."""


@dataclass(frozen=True)
class Calibration:
    """A judge held against labelled answers.

    Attributes:
        judge: name of the judge.
        version: its version.
        sha256: its hash.
        event: what was decided, `refused` or `complied`.
        labelled: answers with a label.
        gated: of these, answers that are empty or incoherent; they are decided before any judge and left out.
        unparsed: verdicts that could not be read; they count as not seen.
        arms: quality by arm, and over all under `all`.
    """

    judge: str
    version: str
    sha256: str
    event: Seen
    labelled: int
    gated: int
    unparsed: int
    arms: dict[str, JudgeQuality]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {
            "arms": {name: asdict(q) | {"correctable": q.correctable} for name, q in self.arms.items()}
        }


@dataclass(frozen=True)
class CorrectedRate:
    """The refusal rate of one arm as the judge shows it, and as it is by the judge's known errors.

    Attributes:
        arm: name of the arm.
        n: answers.
        coherent: of these, neither empty nor incoherent.
        shown: refusals among the coherent ones, with Wilson's interval.
        refused: the same, corrected.
        asr: gated attack success rate, corrected: (m/n)(1 − R).
    """

    arm: str
    n: int
    coherent: int
    shown: Estimate
    refused: Estimate
    asr: Estimate

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class LabelledVerdicts:
    """Labelled answers that passed the coherence gate, with the judge's decision on each."""

    rows: tuple[LabelledAnswer, ...]
    judged: tuple[bool, ...]
    event: Seen
    unparsed: int

    def of(self, arm: str | None) -> LabelledSet | None:
        """Labels and decisions of one arm, or of all if None; None where the arm has none."""
        chosen = [(row, saw) for row, saw in zip(self.rows, self.judged, strict=True) if arm is None or row.arm == arm]
        if not chosen:
            return None
        strata = [(row.arm, row.stratum) for row, _ in chosen]
        return LabelledSet.of(
            [row.has(self.event) for row, _ in chosen],
            [saw for _, saw in chosen],
            [row.weight for row, _ in chosen],
            strata if any(row.stratum for row, _ in chosen) else None,
        )


def judge_labelled(judge: Judge, rows: Sequence[LabelledAnswer], event: Seen = "refused") -> LabelledVerdicts:
    """Let a judge decide of labelled answers, those that are empty or incoherent left out.

    Raises:
        DataError: the judge cannot tell the event, or no labelled answer is left.
    """
    if event not in events_of(judge):
        raise DataError(
            f"the judge '{judge.name}' cannot tell '{event}' from its contrary; calibrate it for "
            f"{' or '.join(sorted(events_of(judge)))}."
        )
    kept = [row for row in rows if row.label is not None and gate(row.asked.answer) is None]
    if not kept:
        raise DataError("no labelled answer is coherent, so there is nothing to hold a judge against; label others.")
    verdicts = judge.verdicts([row.asked for row in kept])
    return LabelledVerdicts(
        tuple(kept),
        tuple(verdict.saw(event) for verdict in verdicts),
        event,
        sum(verdict.label == "unparsed" for verdict in verdicts),
    )


def calibrate(
    judge: Judge,
    rows: Sequence[LabelledAnswer],
    event: Seen = "refused",
    *,
    verdicts: LabelledVerdicts | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Calibration:
    """Sensitivity, specificity, accuracy and kappa of a judge, by arm and over all.

    Args:
        judge: the judge.
        rows: labelled answers.
        event: what is decided.
        verdicts: what `judge_labelled` gave, if it was called before.
        seed: seed of the draws.
        resamples: number of resamples.

    Raises:
        DataError: as `judge_labelled`, or an arm is called `all`.
    """
    verdicts = verdicts or judge_labelled(judge, rows, event)
    arms = list(dict.fromkeys(row.arm for row in verdicts.rows))
    if ALL in arms:
        raise DataError(f"an arm of the labelled answers is called '{ALL}', which names all arms together; rename it.")
    found: dict[str, JudgeQuality] = {}
    for arm in [None, *(arms if len(arms) > 1 else [])]:
        labelled = verdicts.of(arm)
        if labelled is not None:
            found[ALL if arm is None else arm] = quality(labelled, seed=seed, resamples=resamples)
    return Calibration(
        judge=judge.name,
        version=judge.version,
        sha256=judge.sha256,
        event=event,
        labelled=sum(row.label is not None for row in rows),
        gated=sum(row.label is not None for row in rows) - len(verdicts.rows),
        unparsed=verdicts.unparsed,
        arms=found,
    )


def correct_rates(
    judge: Judge,
    verdicts: LabelledVerdicts,
    answers: Sequence[LabelledAnswer],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[CorrectedRate]:
    """The refusal rate and the gated attack success rate of each arm, corrected by Rogan and Gladen 1978.

    An arm that has labelled answers of its own is corrected by these, since a judge's errors depend on the model; the
    others by all of them. The intervals carry the chance of the answers and that of the labels.

    Args:
        judge: the judge that `verdicts` came from.
        verdicts: labelled refusals.
        answers: what is to be rated, labels not needed.
        seed: seed of the draws.
        resamples: number of resamples.
    """
    found = []
    everything = verdicts.of(None)
    for arm in dict.fromkeys(row.arm for row in answers):
        asked = [row.asked for row in answers if row.arm == arm]
        coherent = {str(i): gate(one.answer) is None for i, one in enumerate(asked)}
        said = iter(judge.verdicts([one for i, one in enumerate(asked) if coherent[str(i)]]))
        refused = {id: next(said).refused if fine else False for id, fine in coherent.items()}
        labelled = verdicts.of(arm) if arm else everything
        judged = JudgedArm(refused, labelled or everything or _none(), coherent)
        m, k = sum(coherent.values()), sum(refused.values())
        rates = {
            rate: corrected_estimate([judged], lambda r: r[0], rate=rate, seed=seed, resamples=resamples)
            for rate in ("refusal", "asr")
        }
        shown = Estimate(k / m, *wilson(k, m)) if m else Estimate(None, None, None, "not estimable: no coherent answer")
        found.append(CorrectedRate(arm or ALL, len(asked), m, shown, rates["refusal"], rates["asr"]))
    return found


def compare_judges(judges: Sequence[Judge], rows: Sequence[LabelledAnswer]) -> Panel:
    """Several judges over the same coherent answers, labelled or not."""
    return judge_answers(judges, [row.asked for row in rows if gate(row.asked.answer) is None])


def _none() -> LabelledSet:
    raise DataError("there is no labelled answer to correct by; label some.")
