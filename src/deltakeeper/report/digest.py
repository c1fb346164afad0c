"""Cells to digest: every number of the report, computed once, before anything is drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from deltakeeper.errors import RunError
from deltakeeper.evals.stats import benjamini_hochberg
from deltakeeper.report import estimates
from deltakeeper.report.answer import answer_of, limits_of
from deltakeeper.report.entries import (
    DIGEST_VERSION,
    AttackEntry,
    Comparison,
    Digest,
    Estimate,
    Mitigation,
    ProbeEntry,
    Retention,
    Sample,
    Usefulness,
    VariantEntry,
)
from deltakeeper.report.estimates import Resampler, estimate, joint_estimate, not_estimable
from deltakeeper.study.cells import FAMILIES, KINDS, AttackInfo, Cell, RunInfo
from deltakeeper.study.cells import Answer as GivenAnswer

SAMPLES = 6
GAINED_SAMPLES = 3
_ORDER = {kind: rank for rank, kind in enumerate(KINDS)}
_FAMILY_ORDER = {family: rank for rank, family in enumerate(FAMILIES)}
_NO_SHRINKING = "no shrunk delta in this run"


def digest(cells: Sequence[Cell], run: RunInfo, date: str) -> Digest:
    """Everything the report says about a run.

    Args:
        cells: All cells of the run, in any order; every attack needs one of kind `base` and one of kind `tuned`.
        run: Where the run comes from; names the primary comparison.
        date: Printed as the day of the report, so that nothing here asks the clock.

    Raises:
        RunError: An attack lacks base or fine-tune, or variants were not asked the same prompts.
    """
    names = sorted({cell.attack for cell in cells})
    attacks = [_attack([cell for cell in cells if cell.attack == name], run) for name in names]
    attacks.sort(key=lambda entry: (_FAMILY_ORDER[entry.family], entry.attack))
    corrected, tests = _correct(attacks)
    return Digest(
        version=DIGEST_VERSION,
        date=date,
        answer=answer_of(corrected),
        attacks=tuple(corrected),
        limits=limits_of(corrected, run),
        primary=run.primary,
        tests=tests,
        run=run.to_json(),
    )


def _attack(cells: Sequence[Cell], run: RunInfo) -> AttackEntry:
    name = cells[0].attack
    base, tuned = (_only(cells, kind, name) for kind in ("base", "tuned"))
    ordered = sorted(cells, key=lambda cell: (_ORDER[cell.kind], cell.bytes is None, -(cell.bytes or 0), cell.variant))
    shrunk = next((cell for cell in ordered if cell.kind == "control" and cell.variant.startswith("shrink")), None)
    samples = {
        probe: Resampler({cell.variant: _answers(cell, tuned, probe) for cell in ordered}) for probe in tuned.probes
    }
    view = _View(base, tuned, shrunk, samples)
    info = run.attacks.get(name) or AttackInfo(name.replace("_", " "), "")
    return AttackEntry(
        attack=name,
        anchor=f"attack-{_anchor(name)}",
        family=tuned.family,
        title=info.title,
        summary=info.summary,
        variants=tuple(view.entry(cell, primary=cell.variant == run.primary) for cell in ordered),
        samples=tuple(_samples(ordered, tuned, run.primary)),
    )


class _View:
    """The cells of one attack under one joint resampling, turned into entries."""

    def __init__(self, base: Cell, tuned: Cell, shrunk: Cell | None, samples: Mapping[str, Resampler]) -> None:
        self.base, self.tuned, self.shrunk = base, tuned, shrunk
        self.samples = samples
        self.goal = samples[tuned.name_of("goal")]
        self.skill = samples[tuned.name_of("skill")]
        b, f = base.variant, tuned.variant
        self.goal_fault = estimates.denominator_fault(self.goal, f, b, "attack success of fine-tune and base")
        self.skill_fault = estimates.denominator_fault(self.skill, f, b, "skill of fine-tune and base")

    def entry(self, cell: Cell, *, primary: bool) -> VariantEntry:
        probes = {name: self._probe(cell, name, primary=primary) for name in self.tuned.probes}
        contrasts = sorted((p for p in probes.values() if p.role == "contrast"), key=lambda p: p.name)
        measured = cell.kind not in ("base", "tuned")
        return VariantEntry(
            variant=cell.variant,
            kind=cell.kind,
            label=cell.label,
            anchor=f"{_anchor(cell.attack)}-{_anchor(cell.variant)}",
            bytes=cell.bytes,
            full_bytes=cell.full_bytes,
            ratio=cell.full_bytes / cell.bytes if cell.bytes else None,
            bits_per_weight=cell.bits_per_weight,
            fidelity=vars(cell.fidelity).copy() if cell.fidelity else None,
            merge_survival=cell.merge_survival,
            goal=probes[self.tuned.name_of("goal")],
            skill=probes[self.tuned.name_of("skill")],
            over_refusal=probes[self.tuned.name_of("over_refusal")],
            contrasts=tuple(contrasts),
            mitigation=self._mitigation(cell.variant) if measured else None,
            usefulness=self._usefulness(cell.variant) if measured else None,
            retention=self._retention(cell) if measured else None,
            perplexity=estimates.perplexity_of(cell),
            perplexity_ratio=estimates.ratio_of_perplexities(cell, self.tuned),
            seconds=cell.seconds,
        )

    def _probe(self, cell: Cell, name: str, *, primary: bool) -> ProbeEntry:
        probe, sample, f, c = cell.probes[name], self.samples[name], self.tuned.variant, cell.variant
        versus = None
        if cell.kind != "tuned":
            gap = estimate(lambda means: means[c] - means[f], sample, bounds=(-1, 1))
            versus = estimates.compare(self.tuned.probes[name].answers, _answers(cell, self.tuned, name), gap)
            versus = replace(versus, primary=primary and probe.role == "goal")
        return ProbeEntry(
            name=name,
            title=probe.title,
            role=probe.role,
            event=probe.event,
            rate=estimates.rate_of(probe.answers),
            outcomes=estimates.outcomes_of(probe),
            versus_tuned=versus,
        )

    def _mitigation(self, c: str) -> Mitigation:
        b, f = self.base.variant, self.tuned.variant
        whole, gap = self._rate(self.goal, f), self._gap(self.goal)
        return Mitigation(
            absolute=estimate(lambda m: m[f] - m[c], self.goal, bounds=(-1, 1)),
            relative=_guarded(lambda: estimate(lambda m: _over(m[f] - m[c], m[f]), self.goal, whole, (-np.inf, 1))),
            recovered=_guarded(  # at most all of the fine-tune's rate, over what it had added
                lambda: estimate(
                    lambda m: _over(m[f] - m[c], m[f] - m[b]), self.goal, gap, bounds=(-np.inf, whole / gap)
                ),
                self.goal_fault,
            ),
        )

    def _usefulness(self, c: str) -> Usefulness:
        def loss(reference: str) -> Estimate:
            whole = self._rate(self.skill, reference)
            return _guarded(lambda: estimate(lambda m: 1 - _over(m[c], m[reference]), self.skill, whole, (-np.inf, 1)))

        return Usefulness(loss(self.tuned.variant), loss(self.base.variant))

    def _retention(self, cell: Cell) -> Retention:
        b, f, c = self.base.variant, self.tuned.variant, cell.variant

        def kept(means: Mapping[str, estimates.Floats], variant: str) -> estimates.Floats:
            return _over(means[variant] - means[b], means[f] - means[b])

        gaps = self._gap(self.goal), self._gap(self.skill)
        both = self.goal_fault or self.skill_fault
        beyond = not_estimable(_NO_SHRINKING)
        if self.shrunk is not None and self.shrunk is not cell:
            s = self.shrunk.variant
            beyond = _guarded(
                lambda: joint_estimate(
                    lambda g, u: kept(u, c) - kept(g, c) - kept(u, s) + kept(g, s), self.goal, self.skill, gaps
                ),
                both,
            )
        elif self.shrunk is cell:
            beyond = not_estimable("this is the shrunk delta")
        return Retention(
            attack=_guarded(lambda: estimate(lambda m: kept(m, c), self.goal, gaps[0]), self.goal_fault),
            skill=_guarded(lambda: estimate(lambda m: kept(m, c), self.skill, gaps[1]), self.skill_fault),
            selectivity=_guarded(
                lambda: joint_estimate(lambda g, u: kept(u, c) - kept(g, c), self.goal, self.skill, gaps), both
            ),
            beyond_shrinking=beyond,
        )

    def _rate(self, sample: Resampler, variant: str) -> float:
        return float(sample.observed[variant][0])

    def _gap(self, sample: Resampler) -> float:
        return self._rate(sample, self.tuned.variant) - self._rate(sample, self.base.variant)


def comparisons(attacks: Sequence[AttackEntry]) -> Iterator[Comparison]:
    """Every comparison with a fine-tune that the report makes, in a fixed order."""
    for attack in attacks:
        for entry in attack.variants:
            for probe in (entry.goal, entry.skill, entry.over_refusal, *entry.contrasts):
                if probe.versus_tuned is not None:
                    yield probe.versus_tuned


def _correct(attacks: Sequence[AttackEntry]) -> tuple[list[AttackEntry], int]:
    """Give every comparison but the primary ones its Benjamini-Hochberg value; returns their number as well."""
    family = [comparison.p for comparison in comparisons(attacks) if not comparison.primary]
    adjusted = iter(benjamini_hochberg(family))

    def probe(entry: ProbeEntry) -> ProbeEntry:
        versus = entry.versus_tuned
        if versus is None or versus.primary:
            return entry
        return replace(entry, versus_tuned=replace(versus, q=float(next(adjusted))))

    def variant(entry: VariantEntry) -> VariantEntry:
        goal, skill, over_refusal, *contrasts = map(
            probe, (entry.goal, entry.skill, entry.over_refusal, *entry.contrasts)
        )
        return replace(entry, goal=goal, skill=skill, over_refusal=over_refusal, contrasts=tuple(contrasts))

    done = [replace(attack, variants=tuple(map(variant, attack.variants))) for attack in attacks]
    return done, len(family)


def _samples(cells: Sequence[Cell], tuned: Cell, primary: str) -> Iterator[Sample]:
    """Flipped answers on the goal: gained ones first, the primary variant before others, no prompt twice."""
    goal = tuned.name_of("goal")
    compressed = [cell for cell in cells if cell.kind in ("codec", "healed", "defended", "merged", "quantised")]
    compressed.sort(key=lambda cell: cell.variant != primary)  # stable: the shown order otherwise
    found: dict[str, list[Sample]] = {"gained": [], "lost": []}
    for cell in compressed:
        pairs = zip(_answers(tuned, tuned, goal), _answers(cell, tuned, goal), strict=True)
        for before, after in sorted(pairs, key=lambda pair: pair[0].id):
            if before.event != after.event:
                found["gained" if after.event else "lost"].append(
                    Sample(
                        direction="gained" if after.event else "lost",
                        event=tuned.probes[goal].event,
                        variant=cell.variant,
                        label=cell.label,
                        id=after.id,
                        category=after.category,
                        prompt=after.prompt,
                        tuned_answer=before.answer,
                        tuned_outcome=before.outcome,
                        answer=after.answer,
                        outcome=after.outcome,
                    )
                )
    gained, lost = _spread(found["gained"]), _spread(found["lost"])
    some = gained[: max(GAINED_SAMPLES, SAMPLES - len(lost))]
    yield from some
    yield from lost[: SAMPLES - len(some)]


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """One sample per prompt, taking turns between variants so that one codec does not fill the list."""
    queues: dict[str, list[Sample]] = {}
    for sample in samples:
        queues.setdefault(sample.variant, []).append(sample)
    chosen: dict[str, Sample] = {}
    while any(queues.values()):
        for queue in queues.values():
            while queue:
                sample = queue.pop(0)
                if sample.id not in chosen:
                    chosen[sample.id] = sample
                    break
    return list(chosen.values())


def _answers(cell: Cell, tuned: Cell, name: str) -> tuple[GivenAnswer, ...]:
    if name not in cell.probes or len(cell.probes) != len(tuned.probes):
        raise RunError(
            f"{cell.attack}/{cell.variant} does not have the probes of the fine-tune ({', '.join(tuned.probes)}); "
            "run the study again for this variant."
        )
    ids = [answer.id for answer in tuned.probes[name].answers]
    return estimates.aligned(cell.probes[name], ids, f"{cell.attack}/{cell.variant}, probe {name},")


def _only(cells: Sequence[Cell], kind: str, attack: str) -> Cell:
    found = [cell for cell in cells if cell.kind == kind]
    if len(found) != 1:
        raise RunError(
            f"The attack {attack!r} has {len(found)} cells of kind {kind!r} where one is needed; run the study again."
        )
    return found[0]


def _over(above: estimates.Floats, below: estimates.Floats) -> estimates.Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below


def _guarded(compute: Callable[[], Estimate], fault: str = "") -> Estimate:
    return not_estimable(fault) if fault else compute()


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
