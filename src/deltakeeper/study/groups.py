"""The cells of a run, grouped by attack: arms × seeds, aligned so that everything said of them is paired."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deltakeeper.codecs import parse_codec
from deltakeeper.codecs.controls import Shrink
from deltakeeper.codecs.dense import DenseCodec
from deltakeeper.codecs.sum import SumCodec
from deltakeeper.errors import CodecError, RunError
from deltakeeper.evals.comparison import Clusters
from deltakeeper.evals.pooling import Runs
from deltakeeper.evals.replicates import ReplicatedArms
from deltakeeper.evals.stats.near_duplicates import near_duplicate_clusters
from deltakeeper.study.cells import FAMILIES, KINDS, Cell, Probe


@dataclass(frozen=True)
class Group:
    """All cells of one attack.

    Attributes:
        attack: its name.
        family: its family.
        recipe: SHA-256 of its recipe, None where it was given in code.
        adaptive: what its attacker knew of the codec, None if nothing.
        base: name of the arm that is the aligned base.
        tuned: name of the arm that is the fine-tune.
        arms: cells by arm and seed, arms in the order in which they are shown.
        clusters: by the probe's name, the cluster of near-duplicates of each prompt id; None where all prompts stand
            for themselves.
    """

    attack: str
    family: str
    recipe: str | None
    adaptive: dict[str, Any] | None
    base: str
    tuned: str
    arms: Mapping[str, Mapping[int, Cell]]
    clusters: Mapping[str, Clusters | None] = field(repr=False)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the fine-tune that were answered for."""
        return tuple(sorted(self.arms[self.tuned]))

    def first(self, variant: str) -> Cell:
        """The arm's cell of its first seed."""
        return self.arms[variant][min(self.arms[variant])]

    def shared_seeds(self, *variants: str) -> tuple[int, ...]:
        """Seeds of the fine-tune under which all these arms answered."""
        return tuple(seed for seed in self.seeds if all(seed in self.arms[name] for name in variants))

    def runs(self, variant: str, probe: str, seeds: Iterable[int]) -> Runs:
        """Events of an arm on a probe, by seed and prompt id; what the base says does not depend on the seed.

        Raises:
            RunError: the arm was not put to this probe.
        """
        return {seed: events(self._probe(variant, seed, probe)) for seed in seeds}

    def three_arms(self, variant: str, probe: str, seeds: Iterable[int]) -> ReplicatedArms:
        """Base, fine-tune and an arm on one probe under the seeds given."""
        chosen = tuple(seeds)
        base, tuned, served = (self.runs(name, probe, chosen) for name in (self.base, self.tuned, variant))
        return ReplicatedArms(base, tuned, served, self.clusters[probe])

    def shrunk(self) -> dict[float, str]:
        """Names of the arms that are a plainly shrunk delta, by their factor."""
        found = {shrink_factor(self.first(name)): name for name in self.arms}
        return {factor: name for factor, name in found.items() if factor is not None}

    def name_of(self, role: str) -> str:
        """Name of the one probe of a single role."""
        return self.first(self.tuned).name_of(role)

    def cell(self, variant: str, seed: int) -> Cell:
        """The cell of an arm under a seed; a base that was asked once answers for every seed.

        Raises:
            RunError: there is none.
        """
        found = self.arms[variant]
        if seed in found:
            return found[seed]
        if variant == self.base:
            return self.first(variant)
        raise RunError(f"{self.attack}/{variant} was not run with seed {seed}; finish the study for it.")

    def _probe(self, variant: str, seed: int, probe: str) -> Probe:
        cell = self.cell(variant, seed)
        if probe not in cell.probes:
            raise RunError(f"{self.attack}/{variant} was not put to the probe {probe!r}; run the study again for it.")
        return cell.probes[probe]


def events(probe: Probe) -> dict[str, float]:
    """Whether the event happened, by prompt id, as numbers."""
    return {answer.id: float(answer.event) for answer in probe.answers}


def kind_of(cell: Cell) -> str:
    """The arm's kind; a guard or defence on a control, or on a delta that is not compressed, is a control as well."""
    spelled = cell.arm.get("codec")
    if cell.kind not in ("codec", "healed", "defended") or not isinstance(spelled, str):
        return cell.kind
    try:
        codec = parse_codec(spelled)
    except CodecError:
        return cell.kind
    parts = codec.parts if isinstance(codec, SumCodec) else (codec,)
    return "control" if any(part.control or isinstance(part, DenseCodec) for part in parts) else cell.kind


def shrink_factor(cell: Cell) -> float | None:
    """Factor of a control that only takes a smaller step; None for every other arm, guarded ones too."""
    if cell.kind != "control" or cell.arm.get("heal") or cell.arm.get("defence"):
        return None
    try:
        codec = parse_codec(str(cell.arm.get("codec") or cell.variant))
    except CodecError:
        return None
    return codec.factor if isinstance(codec, Shrink) else None


def clusters_of(probe: Probe) -> Clusters | None:
    """Clusters of near-duplicate prompts of a probe; None if there are none, or if most prompts would be one.

    Prompts made from a template share most of their words whatever they ask, so where fewer than half of them would
    stand for themselves, likeness of words says nothing.
    """
    found = near_duplicate_clusters({answer.id: answer.prompt for answer in probe.answers})
    groups = len(set(found.values()))
    return found if len(found) / 2 <= groups < len(found) else None


def group_cells(cells: Iterable[Cell]) -> tuple[Group, ...]:
    """Cells by attack, families in their order and attackers who know nothing of the codec first.

    Raises:
        RunError: an attack lacks base or fine-tune, has two of them, or a fact that all its cells share differs.
    """
    by_attack: dict[str, list[Cell]] = {}
    for cell in cells:
        by_attack.setdefault(cell.attack, []).append(cell)
    found = [_group(name, members) for name, members in by_attack.items()]
    return tuple(sorted(found, key=lambda g: (FAMILIES.index(g.family), g.adaptive is not None, g.attack)))


def comparable(cells: Iterable[Cell]) -> tuple[list[Cell], tuple[str, ...]]:
    """Cells of the attacks that can be compared by now, and the names of those that lack their base or fine-tune.

    A study that is still under way has such attacks. Where there are no others, all cells are given back, for
    `group_cells` to say what is missing.
    """
    found = list(cells)
    kinds: dict[str, set[str]] = {}
    for cell in found:
        kinds.setdefault(cell.attack, set()).add(cell.kind)
    waiting = tuple(sorted(attack for attack, seen in kinds.items() if not {"base", "tuned"} <= seen))
    if len(waiting) == len(kinds):
        return found, ()
    return [cell for cell in found if cell.attack not in waiting], waiting


def _group(attack: str, cells: list[Cell]) -> Group:
    first = cells[0]
    arms: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        if (cell.family, cell.recipe, cell.adaptive) != (first.family, first.recipe, first.adaptive):
            raise RunError(f"cells of the attack {attack!r} differ in family, recipe or attacker; run it again.")
        row = arms.setdefault(cell.variant, {})
        if cell.seed in row:
            raise RunError(f"{attack}/{cell.variant} has two cells of seed {cell.seed}; delete one of them.")
        row[cell.seed] = cell
    names = {kind: [v for v, row in arms.items() if next(iter(row.values())).kind == kind] for kind in KINDS}
    for kind in ("base", "tuned"):
        if len(names[kind]) != 1:
            raise RunError(
                f"the attack {attack!r} has {len(names[kind])} arms of kind {kind!r}; exactly one is needed."
            )

    def place(variant: str) -> tuple[int, int, str]:
        shown = next(iter(arms[variant].values()))
        return KINDS.index(shown.kind), -(shown.bytes or 0), variant

    return Group(
        attack=attack,
        family=first.family,
        recipe=first.recipe,
        adaptive=first.adaptive,
        base=names["base"][0],
        tuned=names["tuned"][0],
        arms={name: dict(sorted(arms[name].items())) for name in sorted(arms, key=place)},
        clusters={
            name: clusters_of(probe) for name, probe in next(iter(arms[names["tuned"][0]].values())).probes.items()
        },
    )
