"""Traces of a run to a summary: where each attack leaves the base, where each arm is back, and whether it matters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from deltakeeper.lens.commitment import RULES as COMMITMENT
from deltakeeper.lens.comparison import Bands, spread
from deltakeeper.lens.correlation import correlate, rank_correlations
from deltakeeper.lens.departures import RULES as DEPARTURE
from deltakeeper.lens.departures import LayerEstimate, crossed_counts, find_departure, find_return
from deltakeeper.lens.kept import KeptShares
from deltakeeper.lens.separation import LEVEL
from deltakeeper.lens.trace_statistics import Floats
from deltakeeper.study.groups import Group
from deltakeeper.study.held_apart import DIRECTIONS, held_apart
from deltakeeper.study.lens_readings import ArmReadings, AttackReadings, read_attack
from deltakeeper.study.lens_records import AttackLens, Layer, LensArm, LensCorrelation, LensSummary, Line
from deltakeeper.study.store import RunStore
from deltakeeper.study.summary import AttackSummary, Number, Summary

RESAMPLES = 2_000
SEED = 20411  # any fixed number: the same traces give the same summary, byte for byte
UPPER = "stream, upper third"
LAST = "output of the last layer"
DEFINITIONS = {
    "readings": "every seed × prompt that was looked into, at the last token of the prompt, where the answer begins; "
    "intervals are 95 % over resamples of seeds and prompts",
    **DEPARTURE,
    "commitment": f"median over readings of the {COMMITMENT['top1']}",
    "kept": "share of the fine-tuning's shift of the stream that an arm keeps, ⟨h − h_base, h_tuned − h_base⟩ over "
    "‖h_tuned − h_base‖², as a ratio of sums over readings and a third of the layers",
    "kept_output": "1 − √JS(fine-tune, arm) / √JS(base, fine-tune) of the last layer, as a ratio of sums over readings",
    "correlation": "Spearman's ρ over arms between a kept share and the attack's rate; which arms there are is ours to "
    "choose, and the two intervals ask for other arms, and for other seeds and prompts",
}
Places = NDArray[np.signedinteger]
"""Places of layers in the arrays."""
_GROUPS = {"codecs": ("codec",), "all arms": ("codec", "healed", "control", "merged", "quantised", "defended")}


def summarise_lens(store: RunStore, groups: Iterable[Group], summary: Summary) -> LensSummary | None:
    """Everything that is said of what the lens saw of a run; None where no lens looked.

    Args:
        store: the run folder.
        groups: its attacks.
        summary: of the same attacks, which rates and labels come from.

    Raises:
        RunError: an index of traces is malformed.
        DataError: a trace is missing or malformed.
    """
    attacks, position = [], ""
    rows = {attack.attack: attack for attack in summary.attacks}
    for group in groups:
        if group.attack in rows and (found := read_attack(store, group)) is not None:
            attacks.append(_attack(store, group, found, rows[group.attack]))
            position = found.position
    if not attacks:
        return None
    return LensSummary(
        study=summary.study,
        command=summary.command,
        position=position,
        definitions=DEFINITIONS | (DIRECTIONS if any(attack.directions for attack in attacks) else {}),
        attacks=tuple(attacks),
    )


def _attack(store: RunStore, group: Group, found: AttackReadings, summary: AttackSummary) -> AttackLens:
    counts = crossed_counts(
        [seed for seed, _, _ in found.readings],
        [reading[1:] for reading in found.readings],
        resamples=RESAMPLES,
        seed=SEED,
    )
    tuned = found.arms[group.tuned]
    arms = tuple(
        _arm(row.variant, summary, found.arms[row.variant], tuned, found.layers, counts)
        for row in summary.rows
        if row.variant in found.arms
    )
    seen = {seed for seed, _, _ in found.readings}
    asked = sum(len(group.runs(group.tuned, group.name_of("goal"), [seed])[seed]) for seed in seen)
    return AttackLens(
        attack=group.attack,
        family=group.family,
        title=summary.title,
        seeds=tuple(sorted(seen)),
        prompts=len({reading[1:] for reading in found.readings}),
        readings=len(found.readings),
        chosen=len(found.readings) < asked,
        layers=found.layers,
        arms=arms,
        correlations=tuple(_correlations(arms, found, counts)),
        directions=held_apart(store, group, summary),
    )


def _arm(
    variant: str,
    summary: AttackSummary,
    own: ArmReadings,
    tuned: ArmReadings,
    layers: tuple[int, ...],
    counts: Floats,
) -> LensArm:
    row = summary.row(variant)
    assert row is not None
    low, middle, high = (_share(own.stream, part, counts) for part in _thirds(len(layers)))
    plain = {"js_base": own.to_base, "js_tuned": own.to_tuned}
    plain |= {f"prob:{name}": values for name, values in own.targets.items()}
    x = np.array(layers, dtype=np.float64)
    lines = {name: _line(spread(values, x, "", name)) for name, values in plain.items()}
    lines |= {"kept": _line(own.stream.bands()), "kept_output": _line(own.output.bands())}
    return LensArm(
        variant=variant,
        kind=row.kind,
        label=row.label,
        bytes=row.bytes,
        attack=row.attack,
        kept=(low, middle, high),
        kept_output=_share(own.output, np.array([len(layers) - 1]), counts),
        commitment=float(np.median(own.commits)),
        departs=_layer(find_departure(own.to_base, layers, counts)),
        returns=_layer(find_return(own.to_base, own.to_tuned, tuned.to_base, layers, counts)),
        lines=lines,
    )


def _correlations(arms: tuple[LensArm, ...], found: AttackReadings, counts: Floats) -> Iterable[LensCorrelation]:
    upper = _thirds(len(found.layers))[2]
    last = np.array([len(found.layers) - 1])
    for over, kinds in _GROUPS.items():
        chosen = {arm.variant: arm for arm in arms if arm.kind in kinds}
        for share, part in ((UPPER, upper), (LAST, last)):
            kept = {name: (arm.kept[2] if share == UPPER else arm.kept_output).value for name, arm in chosen.items()}
            known = {name: value for name, value in kept.items() if value is not None}
            rates = {name: arm.attack.value for name, arm in chosen.items() if arm.attack.value is not None}
            if not known.keys() & rates.keys():
                continue
            whole = correlate(known, rates, seed=SEED)
            drawn = _drawn([name for name, _, _ in whole.points], found.arms, share, part, counts)
            yield LensCorrelation(
                share=share,
                over=over,
                value=_rounded(whole.value),
                low=_rounded(whole.low),
                high=_rounded(whole.high),
                sampled_low=drawn[0],
                sampled_high=drawn[1],
                p=_rounded(whole.p),
                points=whole.points,
                note=whole.note,
            )


def _drawn(
    names: list[str], arms: Mapping[str, ArmReadings], share: str, part: Places, counts: Floats
) -> tuple[float | None, float | None]:
    """Quantiles of the correlation when seeds and prompts are drawn again, of lens and behaviour alike."""
    kept = np.stack([(arms[n].stream if share == UPPER else arms[n].output).over(part, counts) for n in names], 1)
    rates = np.stack([counts @ arms[n].events / counts.sum(1) for n in names], 1)
    found = rank_correlations(kept, rates)
    if np.isfinite(found).mean() < LEVEL:
        return None, None
    low, high = np.nanquantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return _rounded(low), _rounded(high)


def _thirds(count: int) -> list[Places]:
    """Thirds of the layers from below; of fewer than three layers the last stands for what there is not."""
    return [part if len(part) else np.array([count - 1]) for part in np.array_split(np.arange(count), 3)]


def _share(shares: KeptShares, part: Places, counts: Floats) -> Number:
    value, drawn = float(shares.over(part)[0]), shares.over(part, counts)
    if not math.isfinite(value) or np.isfinite(drawn).mean() < LEVEL:
        return Number(value=None, low=None, high=None, note="the fine-tune does not differ from the base here")
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Number(value=_rounded(value), low=_rounded(low), high=_rounded(high))


def _line(found: Bands) -> Line:
    low, median, high = (tuple(map(_rounded, ends.tolist())) for ends in (found.low, found.median, found.high))
    pooled = None if found.pooled is None else tuple(map(_rounded, found.pooled.tolist()))
    return Line(median=median, low=low, high=high, pooled=pooled)


def _layer(found: LayerEstimate) -> Layer:
    return Layer(layer=found.layer, low=found.low, high=found.high, never=round(found.never, 4))


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}") + 0.0
