"""The summary of a run: everything a table or a figure says of it, small enough to be committed.

Shares and differences of shares lie in [0, 1] and [-1, 1]; intervals are 95 % over seeds × prompts. What cannot be
estimated has no value and says why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deltakeeper.errors import RunError
from deltakeeper.whole_files import write_atomically

SUMMARY_VERSION: Literal[1] = 1
MAX_BYTES = 32 << 20
SUMMARY_NAME = "summary.json"


class Record(BaseModel):
    """A frozen record that takes no field it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Number(Record):
    """A number with its interval, or none with the reason in `note`; a note beside a number is a caution."""

    value: float | None
    low: float | None
    high: float | None
    note: str = ""

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low is not None and self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.high is not None and self.high < 0


class Comparison(Record):
    """A test against the fine-tune: p-value, the same corrected over the run (`q`), and what would have been shown.

    `q` is absent where the comparison was named beforehand. `detectable` is the smallest true difference that these
    seeds and prompts would have shown in four of five studies.
    """

    p: float | None
    q: float | None
    detectable: float | None

    @property
    def clear(self) -> bool:
        """Whether the difference is significant at 5 % after correction."""
        level = self.p if self.q is None else self.q
        return level is not None and level < 0.05


class Versus(Record):
    """An arm against base and fine-tune.

    Attributes:
        absolute: A_f − A_c of the attack rate A.
        relative: (A_f − A_c) / A_f.
        recovered: (A_f − A_c) / (A_f − A_b).
        attack_kept: R_a, the share of the attack that is left.
        skill_kept: R_u, the same of the skill.
        selectivity: R_u − R_a; above zero the attack fades more than the skill.
        over_shrinking: R_a of a plainly shrunk delta that keeps as much skill, minus R_a; and its factor.
        shrinking_factor: that delta's factor.
        equal_norm: attack rate of a delta shrunk to the same norm, minus A_c.
        equal_norm_skill: skill of it, minus that of the arm.
        loss: 1 − U_c/U_f of the skill U.
        loss_bound: one-sided upper 95 % bound of the loss.
        over_refusal_change: refusals of harmless prompts, minus the base's.
        perplexity_ratio: perplexity over the fine-tune's.
        utility: loss of every general task, 1 − U_c/U_f of a score and P_c/P_f − 1 of a perplexity; above zero the
            arm is worse.
        lost: successes of the fine-tune that are none any more, over all seeds.
        gained: successes that the fine-tune did not have.
        gained_share: these as a share of all prompts.
        gained_ids: prompts of them, those gained under most seeds first, ten at most.
        attack_test: the test of A_f − A_c.
        skill_test: the test of U_f − U_c.
    """

    absolute: Number
    relative: Number
    recovered: Number
    attack_kept: Number
    skill_kept: Number
    selectivity: Number
    over_shrinking: Number
    shrinking_factor: float | None
    equal_norm: Number
    equal_norm_skill: Number
    loss: Number
    loss_bound: float | None
    over_refusal_change: Number
    perplexity_ratio: Number
    utility: dict[str, Number] = {}
    lost: int
    gained: int
    gained_share: Number
    gained_ids: tuple[str, ...] = ()
    attack_test: Comparison
    skill_test: Comparison

    def shown_within(self, limit: float) -> bool:
        """Whether the loss of skill is shown to be at most `limit`."""
        return self.loss_bound is not None and self.loss_bound <= limit


class Row(Record):
    """One arm of one attack, over the seeds that it was run with; rates by seed are in their order.

    `utility` is the mean score of every general task, or a perplexity.
    """

    variant: str
    kind: str
    label: str
    bytes: int | None
    bits_per_weight: float | None
    norm_ratio: float | None
    seeds: tuple[int, ...]
    attack: Number
    attack_by_seed: tuple[float, ...]
    skill: Number
    skill_by_seed: tuple[float, ...]
    over_refusal: Number
    over_refusal_by_seed: tuple[float, ...]
    contrasts: dict[str, Number] = {}
    utility: dict[str, float] = {}
    incoherent: float
    versus: Versus | None = None


class AttackSummary(Record):
    """One attack with all its arms; `adaptive` says what its attacker knew, `prompts` counts them by role."""

    attack: str
    family: str
    title: str
    recipe: str | None
    adaptive: dict[str, Any] | None
    seeds: tuple[int, ...]
    prompts: dict[str, int]
    rows: tuple[Row, ...]

    def row(self, variant: str) -> Row | None:
        """The row of an arm, if it was run."""
        return next((row for row in self.rows if row.variant == variant), None)

    def tasks(self) -> tuple[str, ...]:
        """General tasks that its arms were asked, in the order in which they are shown."""
        return tuple(sorted({name for row in self.rows for name in row.utility}))


class PaperBest(Record):
    """The largest reduction of ours under the paper's limit of utility loss."""

    attack: str
    variant: str
    label: str
    reduction: Number
    loss: Number
    shown: bool


class PaperCell(Record):
    """A headline figure of the paper and ours in both readings, without and with guarded healing."""

    family: str
    paper: float
    points: PaperBest | None
    relative: PaperBest | None
    healed_points: PaperBest | None
    healed_relative: PaperBest | None


class Summary(Record):
    """A whole run; `tests` counts the comparisons that the q-values are corrected for."""

    version: Literal[1] = SUMMARY_VERSION
    study: str
    command: str
    model: dict[str, Any]
    versions: dict[str, Any]
    hardware: dict[str, Any]
    judges: tuple[dict[str, str], ...]
    primary: str
    tests: int
    attacks: tuple[AttackSummary, ...]
    paper: tuple[PaperCell, ...]
    notes: tuple[str, ...] = ()

    def families(self) -> tuple[str, ...]:
        """Families in the order in which they are shown."""
        return tuple(dict.fromkeys(attack.family for attack in self.attacks))

    def to_text(self) -> str:
        """JSON, one line an arm, so that a diff shows what moved."""
        whole = self.model_dump(mode="json", exclude_defaults=True) | {"version": self.version}
        attacks = whole.pop("attacks")
        head = json.dumps(whole, sort_keys=True, ensure_ascii=False, allow_nan=False)
        blocks = []
        for attack in attacks:
            rows = ",\n  ".join(json.dumps(row, sort_keys=True, ensure_ascii=False) for row in attack.pop("rows"))
            facts = json.dumps(attack, sort_keys=True, ensure_ascii=False)
            blocks.append(f'{facts[:-1]}, "rows": [\n  {rows}\n ]}}')
        return f'{head[:-1]},\n"attacks": [\n ' + ",\n ".join(blocks) + "\n]}\n"

    @classmethod
    def from_text(cls, text: str, where: str = "summary") -> Summary:
        """Read a summary strictly.

        Raises:
            RunError: it is no JSON, of another version, or a field is missing, unknown or malformed.
        """
        if len(text) > MAX_BYTES:
            raise RunError(f"{where} is larger than {MAX_BYTES} bytes, which no summary is; make it again.")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{where} cannot be read as JSON ({error}); run `deltakeeper report` again.") from error
        if not isinstance(value, dict) or value.get("version") != SUMMARY_VERSION:
            raise RunError(f"{where} is no summary of version {SUMMARY_VERSION}; run `deltakeeper report` again.")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise RunError(f"{where}: {place}: {first['msg'].lower()}; run `deltakeeper report` again.") from error


def write_summary(summary: Summary, path: Path) -> Path:
    """Write a summary; returns its path."""
    write_atomically(path, summary.to_text())
    return path
