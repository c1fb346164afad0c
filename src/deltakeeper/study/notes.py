"""What a reader has to know beside the numbers of a run: seeds, prompts, what is missing, what is biased."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deltakeeper.evals.pooling import FEW_SEEDS
from deltakeeper.study.summary import AttackSummary


def notes_of(attacks: Sequence[AttackSummary], waiting: Sequence[str]) -> Iterator[str]:
    """Sentences on a run's attacks; `waiting` names those that are not measured yet."""
    seeds = sorted({len(attack.seeds) for attack in attacks})
    prompts = sorted({attack.prompts["goal"] for attack in attacks})
    seed_word = "seed" if seeds == [1] else "seeds"
    yield f"{_span(seeds)} {seed_word} and {_span(prompts)} prompts per attack; intervals carry both."
    if seeds[0] == 1:
        yield "With one seed an interval knows of prompts only."
    elif seeds[0] < FEW_SEEDS:
        yield f"With fewer than {FEW_SEEDS} seeds intervals are rough; the rate of every seed stands beside them."
    short = [
        f"{attack.attack}/{row.variant}"
        for attack in attacks
        for row in attack.rows
        if len(row.seeds) < len(attack.seeds)
    ]
    if waiting:
        yield f"Not measured yet, and left out: {', '.join(waiting)}."
    if short:
        yield f"{len(short)} arms were run with fewer seeds than their fine-tune (first: {short[0]})."
    if not any(attack.adaptive for attack in attacks):
        yield "No attacker here knew of the codec: every gain is non-adaptive."
    yield "The largest of several reductions is biased upwards; so is the paper's, which says “up to”."


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
