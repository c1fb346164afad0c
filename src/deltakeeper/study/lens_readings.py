"""Numbers of the traces of an attack, by arm, over the seeds and prompts that were looked into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from deltakeeper.lens.commitment import find_commitment
from deltakeeper.lens.kept import KeptShares, kept_output, kept_stream
from deltakeeper.lens.trace import LensTrace
from deltakeeper.lens.trace_statistics import Floats, collect
from deltakeeper.study.groups import Group
from deltakeeper.study.store import RunStore

Reading = tuple[int, str, str]
"""Seed, name of the probe and id of the prompt."""
PLACE = 0
"""The last token of the prompt, where the answer is decided; the first of the traced positions."""


@dataclass(frozen=True, eq=False)
class ArmReadings:
    """One arm; all arrays float64, n readings, L layers.

    Attributes:
        to_base: JS to the base, (n, L).
        to_tuned: JS to the fine-tune, (n, L).
        stream: kept shares of the stream's shift.
        output: kept shares of the effect on the decoded output.
        commits: layer of commitment, (n,).
        events: whether the attack succeeded, (n,).
        targets: probability by name of a set of tokens, (n, L).
    """

    to_base: Floats
    to_tuned: Floats
    stream: KeptShares
    output: KeptShares
    commits: Floats
    events: Floats
    targets: Mapping[str, Floats]


@dataclass(frozen=True, eq=False)
class AttackReadings:
    """All arms of an attack on the same readings.

    Attributes:
        readings: what was read, in the order of the arrays.
        layers: numbers of the layers.
        position: spelling of the token at which everything was read.
        arms: by name; only arms that were traced on every reading.
    """

    readings: tuple[Reading, ...]
    layers: tuple[int, ...]
    position: str
    arms: Mapping[str, ArmReadings]


def read_attack(store: RunStore, group: Group) -> AttackReadings | None:
    """Read all traces of an attack; None where no lens looked.

    Raises:
        RunError: an index is malformed.
        DataError: a trace is missing or malformed.
    """
    readings: list[Reading] = []
    traces: dict[str, list[LensTrace]] = {}
    for seed in group.seeds:
        for entry in store.read_lens(group.attack, seed):
            readings.append((seed, entry["probe"], entry["sample"]))
            for arm, key in entry["traces"].items():
                # Curves of single tokens are for pages; of thousands of traces they would fill the memory.
                traces.setdefault(arm, []).append(replace(store.read_trace(key), trajectories=(), words={}))
    whole = {arm: own for arm, own in traces.items() if len(own) == len(readings) and arm in group.arms}
    if group.base not in whole or group.tuned not in whole:
        return None
    first = whole[group.base][0]
    return AttackReadings(
        tuple(readings),
        tuple(first.layers.tolist()),
        first.tokens[int(first.positions[0])],
        {arm: _arm(group, arm, own, whole[group.base], readings) for arm, own in whole.items()},
    )


def _arm(
    group: Group, arm: str, own: Sequence[LensTrace], base: Sequence[LensTrace], readings: Sequence[Reading]
) -> ArmReadings:
    events = {key: group.runs(arm, key[1], [key[0]])[key[0]] for key in {(seed, probe) for seed, probe, _ in readings}}
    return ArmReadings(
        to_base=collect(own, f"js:{group.base}", PLACE),
        to_tuned=collect(own, f"js:{group.tuned}", PLACE),
        stream=kept_stream(own, PLACE),
        output=kept_output(own, base, group.tuned, PLACE),
        commits=np.array([find_commitment(trace)[PLACE] for trace in own]),
        events=np.array([events[seed, probe][id] for seed, probe, id in readings]),
        targets={name: collect(own, f"prob:{name}", PLACE) for name in own[0].targets},
    )
