"""What the lens saw over a run, summed up: everything a table or a figure says of it, small enough to be committed."""

from __future__ import annotations

from typing import Literal

from deltakeeper.study.summary import Number, Record

LENS_SUMMARY_NAME = "lens-summary.json"


class Layer(Record):
    """Number of a layer with its 95 % interval; None for never. `never`: share of the resamples without one."""

    layer: int | None
    low: int | None
    high: int | None
    never: float


class Line(Record):
    """A statistic by layer: median and quartiles over readings, and for shares the ratio of sums."""

    median: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    pooled: tuple[float | None, ...] | None = None


class LensArm(Record):
    """One arm of an attack, over the seeds and prompts that were looked into.

    Attributes:
        variant: its name.
        kind: of the arm.
        label: to be shown.
        bytes: of what is served.
        attack: rate of the attack over all prompts of its goal.
        kept: share of the fine-tuning's shift of the stream that is kept, by thirds of the layers from below.
        kept_output: share of the effect on what the last layer says that is kept.
        commitment: layer from which the final likeliest token stays likeliest: median over readings.
        departs: layer from which it differs from the base.
        returns: layer from which it is nearer to the base than to the fine-tune.
        lines: by statistic.
    """

    variant: str
    kind: str
    label: str
    bytes: int | None
    attack: Number
    kept: tuple[Number, Number, Number]
    kept_output: Number
    commitment: float
    departs: Layer
    returns: Layer
    lines: dict[str, Line]


class LensCorrelation(Record):
    """Rank correlation over arms between a kept share and the attack's rate.

    Attributes:
        share: which kept share.
        over: which arms.
        value: Spearman's ρ; None where it is not estimable.
        low: lower end of its 95 % interval, arms taken as drawn from more arms.
        high: upper end.
        sampled_low: lower end where arms stay and seeds and prompts are drawn again.
        sampled_high: upper end.
        p: two-sided, over reorderings of the arms.
        points: arm, kept share, rate.
        note: what it is not.
    """

    share: str
    over: str
    value: float | None
    low: float | None
    high: float | None
    sampled_low: float | None
    sampled_high: float | None
    p: float | None
    points: tuple[tuple[str, float, float], ...]
    note: str


class HeldApart(Record):
    """One arm at the layer that is told first.

    Attributes:
        variant: its name.
        label: to be shown.
        kind: of the arm.
        apart: distance of the two sets on the base's direction, in pooled standard deviations.
        kept: that of their means in shares of the base's.
        control: kind of the control that reaches farthest.
        reach: the size that one in twenty of it reaches.
        share: how many of it come as far as the direction, itself counted in.
    """

    variant: str
    label: str
    kind: str
    apart: Number
    kept: Number
    control: str
    reach: float | None
    share: float | None


class AttackDirections(Record):
    """The base's direction between two probes, in the arms of one fine-tune; `judged`: prompts of each."""

    seed: int
    probes: tuple[str, str]
    layer: int
    judged: tuple[int, int]
    arms: tuple[HeldApart, ...]


class AttackLens(Record):
    """One attack: what was looked into, its arms with base and fine-tune first, and correlations over them."""

    attack: str
    family: str
    title: str
    seeds: tuple[int, ...]
    prompts: int
    readings: int
    chosen: bool
    layers: tuple[int, ...]
    arms: tuple[LensArm, ...]
    correlations: tuple[LensCorrelation, ...]
    directions: tuple[AttackDirections, ...] = ()


class LensSummary(Record):
    """A whole run; `definitions` say how each number comes about, and belong beside it."""

    version: Literal[1] = 1
    study: str
    command: str
    position: str
    definitions: dict[str, str]
    attacks: tuple[AttackLens, ...]
