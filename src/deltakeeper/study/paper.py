"""The figures of arXiv 2411.19530 that a run stands beside.

The abstract says that, with less than 10 % utility loss, delta compression reduces the risk by up to 66.17 %
(alignment breaking), 64.46 % (backdoors) and 90.53 % (targeted output) for Llama-2-7b-chat. Whether these are points
or shares of the uncompressed rate is not said there, so both readings of ours are given.
"""

from __future__ import annotations

from collections.abc import Sequence

from deltakeeper.study.summary import AttackSummary, PaperBest, PaperCell

HEADLINES = {"alignment": 0.6617, "backdoor": 0.6446, "targeted": 0.9053}
"""Largest reduction by family."""

LOSS_LIMIT = 0.1
"""Utility loss under which they hold."""

CODECS = ("codec",)
GUARDED = ("healed",)


def paper_cells(attacks: Sequence[AttackSummary]) -> tuple[PaperCell, ...]:
    """The paper's figures beside the largest of ours, for the families that a run has."""
    return tuple(_paper(family, attacks) for family in HEADLINES if any(a.family == family for a in attacks))


def _paper(family: str, attacks: Sequence[AttackSummary]) -> PaperCell:
    def best(kinds: Sequence[str], reading: str) -> PaperBest | None:
        found = []
        for attack in attacks:
            for row in attack.rows if attack.family == family and attack.adaptive is None else ():
                versus = row.versus if row.kind in kinds else None
                if versus is None or versus.loss.value is None or versus.loss.value >= LOSS_LIMIT:
                    continue
                reduction = getattr(versus, reading)
                if reduction.value is not None:
                    found.append(
                        (
                            reduction.value,
                            row.variant,
                            PaperBest(
                                attack=attack.attack,
                                variant=row.variant,
                                label=row.label,
                                reduction=reduction,
                                loss=versus.loss,
                                shown=versus.shown_within(LOSS_LIMIT),
                            ),
                        )
                    )
        return max(found, key=lambda one: one[:2])[2] if found else None

    return PaperCell(
        family=family,
        paper=HEADLINES[family],
        points=best(CODECS, "absolute"),
        relative=best(CODECS, "relative"),
        healed_points=best(GUARDED, "absolute"),
        healed_relative=best(GUARDED, "relative"),
    )
