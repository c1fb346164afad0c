"""What advice consists of: the terms asked for, the arms that were judged, and the gap between the best two."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deltakeeper.study.summary import Number, Record

Verdict = Literal["use", "cannot tell", "none"]


class Terms(Record):
    """What is asked for.

    Attributes:
        max_loss: largest loss of skill against the fine-tune, as a share; it must be *shown* (one-sided 95 % bound).
        families: families whose attacks count; empty for all that the run has.
        max_bytes: largest stored size of a delta.
        max_over_refusal: largest rise over the base of the share of harmless prompts that are refused.
        adaptive: whether attackers who know the codec count; an arm that none was aimed at is then not advised.
    """

    max_loss: float = Field(default=0.1, ge=0, le=1)
    families: tuple[str, ...] = ()
    max_bytes: int | None = Field(default=None, ge=0)
    max_over_refusal: float | None = Field(default=None, ge=-1, le=1)
    adaptive: bool = False


class Arm(Record):
    """One arm as advice sees it.

    Attributes:
        variant: its name in the run.
        kind: its kind.
        label: the same in words.
        bytes: stored size, the largest over the fine-tunes.
        attacks: success of every attack that counts, minus the base's on the same prompts.
        worst: the attack whose value is largest.
        risk: that value, the added risk.
        left: success rate of that attack, the base's own included.
        loss: loss of skill against the fine-tunes, 1 − U_c/U_f, over all attacks together.
        loss_bound: its one-sided upper 95 % bound.
        over_refusal: refusals of harmless prompts, minus the base's.
        adaptive: the worst attack by someone who knows the arm, minus the base's; None if there was none.
        adaptive_attack: its name.
        refused: why the arm cannot be advised; empty if it can.
        frontier: whether no other arm that could be advised is better in risk or loss and no worse in the other.
        q: p-value of its risk against the lowest, corrected for the number of arms; None for arms not compared.
    """

    variant: str
    kind: str
    label: str
    bytes: int | None
    attacks: dict[str, Number]
    worst: str | None
    risk: Number
    left: float | None
    loss: Number
    loss_bound: float | None
    over_refusal: Number
    adaptive: Number | None = None
    adaptive_attack: str | None = None
    refused: str = ""
    frontier: bool = False
    q: float | None = None


class Gap(Record):
    """Risk of the runner-up minus risk of the best, and what it would take to tell them apart.

    Attributes:
        best: the arm of the lowest risk.
        other: the arm that it is compared with.
        difference: the gap, with a 95 % interval.
        p: two-sided p-value.
        q: the same corrected for the number of arms compared.
        seeds: seeds that both were run with.
        prompts: prompts that were put to both.
        detectable: smallest true gap that would have been shown in four of five studies.
        more_seeds: seeds that would show this gap with the prompts there are; None if none would, or one seed is no
            ground for saying.
        more_prompts: prompts that would show it with the seeds there are; None if none would.
        more_both: seeds and prompts that would show it together, where neither alone does.
    """

    best: str
    other: str
    difference: Number
    p: float
    q: float
    seeds: int
    prompts: int
    detectable: float
    more_seeds: int | None
    more_prompts: int | None
    more_both: tuple[int, int] | None


class Advice(Record):
    """What a run supports.

    Attributes:
        verdict: `use` an arm, `cannot tell` between several, or `none` can be advised.
        sentence: the verdict in one sentence.
        pick: the arm to use; None unless the verdict is `use`.
        leading: the arm of the lowest risk among those that can be advised.
        tied: the arms that cannot be told from it, smallest first, itself included; empty unless the verdict says so.
        terms: what was asked for.
        families: families that counted.
        attacks: attacks that counted.
        evidence: `non-adaptive`, or `adaptive` where attackers who know the codec counted.
        cautions: sentences that belong beside the verdict.
        gap: the comparison that decides between `use` and `cannot tell`; None where one arm stands alone.
        versus_tuned: what the uncompressed fine-tune adds to the risk of `leading`; None without such an arm.
        arms: all arms, those that can be advised first, lowest risk first; references and controls last.
    """

    verdict: Verdict
    sentence: str
    pick: str | None
    leading: str | None
    tied: tuple[str, ...] = ()
    terms: Terms
    families: tuple[str, ...]
    attacks: tuple[str, ...]
    evidence: Literal["non-adaptive", "adaptive"]
    cautions: tuple[str, ...] = ()
    gap: Gap | None = None
    versus_tuned: Gap | None = None
    arms: tuple[Arm, ...]
