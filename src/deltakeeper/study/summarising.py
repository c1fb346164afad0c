"""Cells to a summary: every number of a run over seeds × prompts, computed once, before anything is drawn."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltakeeper.errors import RunError
from deltakeeper.evals import replicates
from deltakeeper.evals.pooling import Replicated, Runs
from deltakeeper.evals.replicates import ReplicatedArms
from deltakeeper.evals.stats import Estimate, benjamini_hochberg
from deltakeeper.evals.utility.comparison import RATES
from deltakeeper.study.cells import Cell, RunInfo
from deltakeeper.study.groups import Group, comparable, group_cells, kind_of
from deltakeeper.study.notes import notes_of
from deltakeeper.study.paper import paper_cells
from deltakeeper.study.summary import (
    AttackSummary,
    Comparison,
    Number,
    Row,
    Summary,
    Versus,
)

RESAMPLES = 2_000
"""The bootstrap gives only the shape of an interval, so few resamples do."""
SEED = 20411  # any fixed number: the same cells give the same summary, byte for byte
MOST_IDS = 10
_CAUTION = re.compile(r"(\d+ seeds: the interval is rough|one seed: the interval knows of prompts only)(; )?")


def summarise(cells: Iterable[Cell], run: RunInfo) -> Summary:
    """Everything a table or a figure says of a run.

    Args:
        cells: all cells of the run, in any order; an attack whose base or fine-tune is
            not measured yet is left out, and a note says so.
        run: where the run comes from; names the primary comparison.

    Raises:
        RunError: no attack has both base and fine-tune, or arms were not put to the same probes.
        DataError: arms were not asked the same prompts.
    """
    ready, waiting = comparable(cells)
    groups = group_cells(ready)
    attacks, tests = _corrected([_attack(group, run) for group in groups], run.primary)
    return Summary(
        study=run.study,
        command=run.command,
        model=run.model,
        versions=run.versions,
        hardware=run.hardware,
        judges=tuple({"name": j.name, "version": j.version, "sha256": j.sha256} for j in run.judges),
        primary=run.primary,
        tests=tests,
        attacks=tuple(attacks),
        paper=paper_cells(attacks),
        notes=(*run.notes, *notes_of(attacks, waiting)),
    )


def rows_of(group: Group, variants: Iterable[str] | None = None) -> tuple[Row, ...]:
    """One row for every arm of an attack (or those of some names), over the seeds that it was run with."""
    wanted = None if variants is None else set(variants)
    return tuple(_row(group, variant) for variant in group.arms if wanted is None or variant in wanted)


def _attack(group: Group, run: RunInfo) -> AttackSummary:
    info = run.attacks.get(group.attack)
    tuned = group.first(group.tuned)
    return AttackSummary(
        attack=group.attack,
        family=group.family,
        title=info.title if info else group.attack.replace("_", " "),
        recipe=group.recipe,
        adaptive=_plain(group.adaptive),
        seeds=group.seeds,
        prompts={role: len(tuned.probe_of(role).answers) for role in ("goal", "skill", "over_refusal")},
        rows=_told_apart(rows_of(group)),
    )


def _told_apart(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows whose labels, where two are alike, name the arm as well."""
    times = Counter(row.label for row in rows)
    return tuple(
        row.model_copy(update={"label": f"{row.label}: {row.variant}"}) if times[row.label] > 1 else row for row in rows
    )


def _row(group: Group, variant: str) -> Row:
    cell = group.first(variant)
    seeds = group.shared_seeds(variant) if variant != group.base else group.seeds
    goal, skill, refusals = (group.name_of(role) for role in ("goal", "skill", "over_refusal"))
    rates = {name: _rate(group, variant, name, seeds) for name in cell.probes}
    answers = [answer for seed in seeds for answer in group.cell(variant, seed).probes[goal].answers]
    return Row(
        variant=variant,
        kind=kind_of(cell),
        label=cell.label,
        bytes=cell.bytes,
        bits_per_weight=_rounded(cell.bits_per_weight),
        norm_ratio=_rounded(cell.fidelity.norm_ratio if cell.fidelity else None),
        seeds=seeds,
        attack=rates[goal][0],
        attack_by_seed=rates[goal][1],
        skill=rates[skill][0],
        skill_by_seed=rates[skill][1],
        over_refusal=rates[refusals][0],
        over_refusal_by_seed=rates[refusals][1],
        contrasts={name: rates[name][0] for name, probe in cell.probes.items() if probe.role == "contrast"},
        utility={name: round(task.score, 5) for name, task in _tasks(group, variant, seeds).items()},
        incoherent=round(sum(a.outcome in ("incoherent", "empty") for a in answers) / len(answers), 5),
        versus=None if variant in (group.base, group.tuned) else _versus(group, variant, seeds),
    )


def _rate(group: Group, variant: str, probe: str, seeds: Sequence[int]) -> tuple[Number, tuple[float, ...]]:
    runs = group.runs(variant, probe, seeds)
    found = replicates.rate(runs, group.clusters[probe], seed=SEED, resamples=RESAMPLES)
    by_seed = tuple(round(sum(scores.values()) / len(scores), 5) for _, scores in sorted(runs.items()))
    return number(found.pooled), by_seed


def _versus(group: Group, variant: str, seeds: Sequence[int]) -> Versus:
    settings: dict[str, Any] = {"seed": SEED, "resamples": RESAMPLES}
    goal, skill = (group.three_arms(variant, group.name_of(role), seeds) for role in ("goal", "skill"))
    refusals = group.three_arms(variant, group.name_of("over_refusal"), seeds)
    mitigation = replicates.mitigation(goal, **settings)
    kept = replicates.selectivity(goal, skill, **settings)
    loss = replicates.utility_loss(skill, **settings)
    skill_lost = replicates.difference(skill.tuned, skill.served, skill.clusters, **settings)
    refused = replicates.difference(refusals.served, refusals.base, refusals.clusters, **settings)
    over, factor = _over_shrinking(group, variant, goal, skill)
    equal = [_equal_norm(group, variant, arms, role) for arms, role in ((goal, "goal"), (skill, "skill"))]
    flips = goal.flips()
    gained = Counter(id for table in flips.values() for id in table.gained_ids)
    new = {seed: {id: float(id in flips[seed].gained_ids) for id in goal.prompts} for seed in goal.seeds}
    tuned_tasks, served_tasks = (_tasks(group, name, seeds) for name in (group.tuned, variant))
    return Versus(
        absolute=number(mitigation.absolute.pooled),
        relative=number(mitigation.relative.pooled),
        recovered=number(mitigation.recovered.pooled),
        attack_kept=number(kept.attack.pooled),
        skill_kept=number(kept.skill.pooled),
        selectivity=number(kept.difference.pooled),
        over_shrinking=over,
        shrinking_factor=factor,
        equal_norm=equal[0],
        equal_norm_skill=_negated(equal[1]),
        loss=number(loss.versus_tuned.pooled),
        loss_bound=_rounded(loss.bound),
        over_refusal_change=number(refused.pooled),
        perplexity_ratio=_perplexity_ratio(group, variant, seeds),
        utility={
            name: _task_loss(tuned_tasks[name], served_tasks[name]) for name in served_tasks if name in tuned_tasks
        },
        lost=sum(table.lost for table in flips.values()),
        gained=sum(table.gained for table in flips.values()),
        gained_share=number(replicates.rate(new, goal.clusters, **settings).pooled),
        gained_ids=tuple(id for id, _ in sorted(gained.items(), key=lambda item: (-item[1], item[0]))[:MOST_IDS]),
        attack_test=_test(mitigation.absolute, goal),
        skill_test=_test(skill_lost, skill),
    )


def _test(found: Replicated, arms: ReplicatedArms) -> Comparison:
    """Student's t over seeds and prompts, never below the sign test; the exact McNemar test where there is one seed."""
    p, detectable = found.p, found.detectable
    if p is not None:
        p = max(p, replicates.sign_test(arms.tuned, arms.served, arms.clusters))
    if len(arms.seeds) == 1 and arms.clusters is None:
        table = arms.flips()[arms.seeds[0]]
        p, detectable = table.p, table.detectable
    return Comparison(p=None if p is None else float(f"{p:.4g}"), q=None, detectable=_rounded(detectable))


def _over_shrinking(
    group: Group, variant: str, goal: ReplicatedArms, skill: ReplicatedArms
) -> tuple[Number, float | None]:
    if variant in group.shrunk().values():
        return absent("this is the shrunk delta"), None
    shrunk = {
        factor: (
            group.runs(name, group.name_of("goal"), goal.seeds),
            group.runs(name, group.name_of("skill"), goal.seeds),
        )
        for factor, name in group.shrunk().items()
        if 0 < factor < 1 and group.shared_seeds(name, variant) == goal.seeds
    }
    if not shrunk:
        return absent("no shrunk delta of these seeds"), None
    found = replicates.gain_over_shrinking(goal, skill, shrunk, seed=SEED, resamples=RESAMPLES)
    return number(found.gain.pooled), _rounded(found.factor)


def _equal_norm(group: Group, variant: str, arms: ReplicatedArms, role: str) -> Number:
    """Rate of the delta shrunk to the arm's norm, between the factors that were run, minus the arm's rate."""
    fidelity = group.first(variant).fidelity
    if fidelity is None:
        return absent("the norm of its delta is not known")
    probe, norm = group.name_of(role), fidelity.norm_ratio
    path: dict[float, Runs] = {0.0: arms.base, 1.0: arms.tuned}
    for factor, name in group.shrunk().items():
        if 0 < factor < 1 and group.shared_seeds(name, variant) == arms.seeds:
            path[factor] = group.runs(name, probe, arms.seeds)
    if len(path) == 2:
        return absent("no shrunk delta of these seeds")
    if not 0 <= norm <= 1:
        return absent("its delta is longer than the fine-tune's")
    below, above = max(f for f in path if f <= norm), min(f for f in path if f >= norm)
    share = (norm - below) / (above - below) if above > below else 0.0
    between = {
        seed: {id: (1 - share) * path[below][seed][id] + share * path[above][seed][id] for id in arms.prompts}
        for seed in arms.seeds
    }
    found = replicates.difference(between, arms.served, arms.clusters, seed=SEED, resamples=RESAMPLES)
    return number(found.pooled)


def _perplexity_ratio(group: Group, variant: str, seeds: Sequence[int]) -> Number:
    tuned, served = ({seed: group.cell(name, seed).perplexity for seed in seeds} for name in (group.tuned, variant))
    logs: list[Runs] = []
    counts: list[Runs] = []
    for read in (tuned, served):
        known = {seed: one for seed, one in read.items() if one is not None}
        if len(known) < len(seeds):
            return absent("not measured")
        logs.append({seed: _by_place(one.nll) for seed, one in known.items()})
        counts.append({seed: _by_place(one.tokens) for seed, one in known.items()})
    if counts[0] != counts[1]:
        return absent("the fine-tune read other passages")
    return _ratio(_Task(logs[0], counts[0]), _Task(logs[1], counts[1]))


def _by_place(values: Sequence[float]) -> dict[str, float]:
    return {f"{place:06d}": value for place, value in enumerate(values)}


@dataclass(frozen=True)
class _Task:
    """Scores of a general task, or for a perplexity the nats of each text with the counts that share them out."""

    values: Runs
    counts: Runs | None = None

    @property
    def score(self) -> float:
        """Mean score, or perplexity (no more than a float holds)."""
        total = sum(value for scores in self.values.values() for value in scores.values())
        if self.counts is None:
            return total / sum(map(len, self.values.values()))
        return math.exp(min(total / sum(x for counts in self.counts.values() for x in counts.values()), 700.0))


def _ratio(tuned: _Task, served: _Task) -> Number:
    """Perplexity of the served model over the fine-tune's on the same texts."""
    logs: dict[int, dict[str, float]] = {}
    for seed, counts in (tuned.counts or {}).items():
        scale = len(counts) / sum(counts.values())
        logs[seed] = {id: (served.values[seed][id] - tuned.values[seed][id]) * scale for id in counts}
    if not any(gap for gaps in logs.values() for gap in gaps.values()):
        return Number(value=1.0, low=1.0, high=1.0, note="every likelihood is the fine-tune's")
    found = replicates.rate(logs, seed=SEED, resamples=RESAMPLES)
    ends = [math.exp(x) if x is not None and x < 700 else None for x in (found.value, found.low, found.high)]
    return number(Estimate(ends[0], ends[1], ends[2], found.note)) if ends[0] else absent("beyond a float")


def _tasks(group: Group, variant: str, seeds: Sequence[int]) -> dict[str, _Task]:
    """Every general task that the arm has under all seeds; the nats of a text and their counts are one, a perplexity.

    Raises:
        RunError: nats come without their counts.
    """
    cells = {seed: group.cell(variant, seed) for seed in seeds}
    names = [set(cell.utility) for cell in cells.values()]
    shared = set.intersection(*names) if names else set()

    def values(name: str, sign: float = 1.0) -> Runs:
        return {seed: {i.id: sign * i.score for i in cell.utility[name].items} for seed, cell in cells.items()}

    found: dict[str, _Task] = {}
    for name in sorted(shared):
        metric = next(iter(cells.values())).utility[name].metric
        if metric in {weight for weight, _, _ in RATES.values()}:
            continue  # how many tokens a text has is no score
        if metric not in RATES:
            found[name] = _Task(values(name))
            continue
        weight, sign, title = RATES[metric]
        counted, told = (_renamed(name, metric, word) for word in (weight, title))
        if counted not in shared:
            raise RunError(f"{group.attack}/{variant} has {name} without its '{weight}'; run the study again.")
        found[told] = _Task(values(name, sign), values(counted))
    return found


def _renamed(name: str, metric: str, word: str) -> str:
    """The name of a task's measure with another metric in it: `text nll` becomes `text tokens`."""
    before, _, after = name.rpartition(f" {metric}")
    return f"{before} {word}{after}"


def _task_loss(tuned: _Task, served: _Task) -> Number:
    """Loss of a general task: 1 − U_c/U_f of a score, P_c/P_f − 1 of a perplexity; above zero the arm is worse."""
    if tuned.counts is not None:
        if tuned.counts != served.counts:
            return absent("the fine-tune read other passages")
        ratio = _ratio(tuned, served)
        ends = [None if end is None else _rounded(end - 1) for end in (ratio.value, ratio.low, ratio.high)]
        return Number(value=ends[0], low=ends[1], high=ends[2], note=ratio.note)
    arms = ReplicatedArms(tuned.values, tuned.values, served.values)
    return number(replicates.utility_loss(arms, seed=SEED, resamples=RESAMPLES).versus_tuned.pooled)


def _corrected(attacks: Sequence[AttackSummary], primary: str) -> tuple[list[AttackSummary], int]:
    """Benjamini-Hochberg over all tests of the run but those of the attack that were named beforehand."""

    def tests(attack: AttackSummary) -> Iterator[Comparison]:
        for row in attack.rows:
            if row.versus is not None:
                if row.variant != primary:
                    yield row.versus.attack_test
                yield row.versus.skill_test

    values = [test.p for attack in attacks for test in tests(attack) if test.p is not None]
    adjusted = iter(benjamini_hochberg(values))

    def correct(test: Comparison) -> Comparison:
        return test if test.p is None else test.model_copy(update={"q": float(f"{next(adjusted):.4g}")})

    def row(old: Row) -> Row:
        if old.versus is None:
            return old
        update = {} if old.variant == primary else {"attack_test": correct(old.versus.attack_test)}
        update["skill_test"] = correct(old.versus.skill_test)
        return old.model_copy(update={"versus": old.versus.model_copy(update=update)})

    done = [attack.model_copy(update={"rows": tuple(map(row, attack.rows))}) for attack in attacks]
    return done, len(values)


def _plain(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if value is None else dict(json.loads(json.dumps(value, sort_keys=True)))


def number(found: Estimate) -> Number:
    """An estimate as it is stored: five decimals are more than any of these numbers carry.

    The caution about few seeds is left out: every number of a row would repeat it, and the summary says it once.
    """
    note = _CAUTION.sub("", found.note)
    return Number(value=_rounded(found.value), low=_rounded(found.low), high=_rounded(found.high), note=note)


def absent(reason: str) -> Number:
    """A number that is not there, with its reason."""
    return Number(value=None, low=None, high=None, note=reason)


def _negated(found: Number) -> Number:
    if found.value is None or found.low is None or found.high is None:
        return found
    return Number(value=0.0 - found.value, low=0.0 - found.high, high=0.0 - found.low, note=found.note)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5) + 0.0
