"""The digest of a run as frozen records: what `report.json` holds and what the page and the terminal read.

Shares and differences of shares lie in [0, 1] and [-1, 1]; intervals are 95 %. What cannot be estimated has
`value=None` and a note saying why; nothing is left out for being absent, perfect or zero.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DIGEST_VERSION = 1


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, or None with the reason in `note`; a note beside a number is a caution."""

    value: float | None
    low: float | None
    high: float | None
    note: str = ""

    @property
    def estimable(self) -> bool:
        """Whether value and interval are there."""
        return self.value is not None and self.low is not None and self.high is not None

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low is not None and self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.high is not None and self.high < 0


@dataclass(frozen=True)
class Rate:
    """`hits` of `n` answers with the event, with the Wilson interval; zero hits are to be read as `at most high`."""

    hits: int
    n: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A variant against the fine-tune on the same prompts of one probe.

    `difference` is variant minus fine-tune with a paired bootstrap interval; `p` is the exact McNemar test on `lost`
    and `gained`; `q` is `p` after Benjamini-Hochberg, None for the comparison named beforehand (`primary`).
    `gained_rate` is the share of all prompts on which the event is new. `detectable` is the smallest difference that
    this many prompts would have shown in four of five studies, None if no difference would have been.
    `transitions[f][c]` counts prompts by outcome of the fine-tune and of the variant.
    """

    difference: Estimate
    p: float
    q: float | None
    primary: bool
    kept: int
    lost: int
    gained: int
    never: int
    lost_ids: tuple[str, ...]
    gained_ids: tuple[str, ...]
    gained_rate: Rate
    detectable: float | None
    transitions: dict[str, dict[str, int]]

    @property
    def direction(self) -> int:
        """-1 or +1 where the change is clear at the 5 % level after correction, otherwise 0."""
        level = self.p if self.q is None else self.q
        if level >= 0.05 or self.lost == self.gained:
            return 0
        return -1 if self.lost > self.gained else 1


@dataclass(frozen=True)
class ProbeEntry:
    """One probe of one variant: the rate of its event, outcomes counted, and the comparison with the fine-tune."""

    name: str
    title: str
    role: str
    event: str
    rate: Rate
    outcomes: dict[str, int]
    versus_tuned: Comparison | None


@dataclass(frozen=True)
class Mitigation:
    """How far an attack comes down: in points, relative to the fine-tune, and as a share of the way to base."""

    absolute: Estimate
    relative: Estimate
    recovered: Estimate


@dataclass(frozen=True)
class Usefulness:
    """Loss of the skill score: 1 - U/U_tuned and 1 - U/U_base."""

    loss_versus_tuned: Estimate
    loss_versus_base: Estimate


@dataclass(frozen=True)
class Retention:
    """What is left of what the fine-tune added, (x - base) / (tuned - base), for the attack and for the skill.

    `selectivity` is skill minus attack: above zero the attack fades first. `beyond_shrinking` is the selectivity minus
    that of the plainly shrunk delta: unless its interval lies above zero, the codec shows no more than shrinking does.
    """

    attack: Estimate
    skill: Estimate
    selectivity: Estimate
    beyond_shrinking: Estimate


@dataclass(frozen=True)
class VariantEntry:
    """One row of the report: one attack, one variant."""

    variant: str
    kind: str
    label: str
    anchor: str
    bytes: int | None
    full_bytes: int
    ratio: float | None
    bits_per_weight: float | None
    fidelity: dict[str, float] | None
    merge_survival: float | None
    goal: ProbeEntry
    skill: ProbeEntry
    over_refusal: ProbeEntry
    contrasts: tuple[ProbeEntry, ...]
    mitigation: Mitigation | None
    usefulness: Usefulness | None
    retention: Retention | None
    perplexity: float | None
    perplexity_ratio: Estimate
    seconds: float


@dataclass(frozen=True)
class Sample:
    """A prompt whose verdict the variant turned: `direction` is `lost` (attack gone) or `gained` (attack new)."""

    direction: str
    event: str
    variant: str
    label: str
    id: str
    category: str
    prompt: str
    tuned_answer: str
    tuned_outcome: str
    answer: str
    outcome: str


@dataclass(frozen=True)
class AttackEntry:
    """One attack with all its variants, in the order in which they are shown."""

    attack: str
    anchor: str
    family: str
    title: str
    summary: str
    variants: tuple[VariantEntry, ...]
    samples: tuple[Sample, ...]

    def first(self, kind: str) -> VariantEntry | None:
        """The first variant of a kind, if there is one."""
        return next((variant for variant in self.variants if variant.kind == kind), None)


@dataclass(frozen=True)
class Answer:
    """The two sentences, and the one word they come down to."""

    verdict: str
    attack: str
    usefulness: str


@dataclass(frozen=True)
class Digest:
    """A whole run: the answer, the attacks, the limits, and where it all comes from."""

    version: int
    date: str
    answer: Answer
    attacks: tuple[AttackEntry, ...]
    limits: tuple[str, ...]
    primary: str
    tests: int
    run: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The digest as plain JSON values."""
        return asdict(self)
