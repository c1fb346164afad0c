"""What a study measures, as frozen records: one `Cell` per fine-tune and arm.

A cell keeps every answer, because every comparison is paired by prompt id and every number must open to its samples.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from deltakeeper.errors import RunError
from deltakeeper.study.answers import EVENTS, OUTCOMES, ROLES, Answer, Perplexity, Probe, Utility, UtilityItem
from deltakeeper.study.fields import Fields, check_version
from deltakeeper.study.run_info import AttackInfo, Judge, RunInfo

__all__ = [
    "CELL_VERSION",
    "EVENTS",
    "FAMILIES",
    "KEY",
    "KINDS",
    "OUTCOMES",
    "ROLES",
    "SINGLE_ROLES",
    "Answer",
    "AttackInfo",
    "Cell",
    "Fidelity",
    "Judge",
    "Perplexity",
    "Probe",
    "RunInfo",
    "Utility",
    "UtilityItem",
]

KEY = re.compile(r"[0-9a-f]{8,64}")
"""What the key of a cell or of a trace looks like, of which file names are made."""
CELL_VERSION = 2

FAMILIES = ("alignment", "backdoor", "targeted", "hallucination", "benign")
KINDS = ("base", "tuned", "codec", "healed", "defended", "merged", "quantised", "control")
SINGLE_ROLES = ("goal", "skill", "over_refusal")


@dataclass(frozen=True)
class Fidelity:
    """How near the decoded delta is to the true one, over all encoded tensors (methods: ‖·‖ is Frobenius)."""

    relative_error: float
    cosine: float
    norm_ratio: float
    sign_agreement: float

    @classmethod
    def from_fields(cls, fields: Fields) -> Fidelity:
        """Read the four numbers; raises RunError on a missing, unknown or malformed one."""
        with fields as read:
            return cls(
                relative_error=read.number("relative_error"),
                cosine=read.number("cosine"),
                norm_ratio=read.number("norm_ratio"),
                sign_agreement=read.number("sign_agreement"),
            )


@dataclass(frozen=True)
class Cell:
    """Everything measured for one arm of one fine-tune.

    Attributes:
        attack: name of what was trained, the same for every seed; an adaptive attacker has a name of its own.
        family: one of `FAMILIES`.
        variant: the arm's name, unique among the arms of a fine-tune.
        kind: one of `KINDS`.
        label: the arm in words.
        bytes: what is stored, None where nothing is.
        full_bytes: size of the whole fine-tuned checkpoint.
        bits_per_weight: bits of all that is stored, per weight of the model.
        fidelity: error of the decoded delta, for arms that compress one.
        merge_survival: share of delta entries that a rounded merge did not swallow.
        probes: all answers, by the probe's name.
        perplexity: likelihoods of the passages.
        seconds: wall time; not part of what is compared when runs are.
        seed: seed of the fine-tune; a base has none of its own and repeats that of the fine-tune it stands beside.
        recipe: SHA-256 of the recipe, None for an attack that was given in code.
        adaptive: what the attacker knew of the codec and did, None for one that knew nothing.
        arm: the arm as the study file spells it: `codec`, `planes`, `heal`, `defence`, and what else applies.
        artifact: SHA-256 of the manifest of the artifact that answered, None where none did.
        utility: scores of general tasks, by the task's name.
    """

    attack: str
    family: str
    variant: str
    kind: str
    label: str
    bytes: int | None
    full_bytes: int
    bits_per_weight: float | None
    fidelity: Fidelity | None
    merge_survival: float | None
    probes: dict[str, Probe]
    perplexity: Perplexity | None
    seconds: float
    seed: int = 0
    recipe: str | None = None
    adaptive: dict[str, Any] | None = None
    arm: dict[str, Any] = field(default_factory=dict)
    artifact: str | None = None
    utility: dict[str, Utility] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The cell as a JSON object with its version."""
        return {"version": CELL_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any, where: str = "cell") -> Cell:
        """Read a cell strictly; raises RunError that names `where` and the field at fault."""
        with Fields(value, where) as read:
            check_version(read, where, CELL_VERSION)
            fidelity = read.optional_object("fidelity")
            perplexity = read.optional_object("perplexity")
            cell = cls(
                attack=read.text("attack"),
                family=read.choice("family", FAMILIES),
                variant=read.text("variant"),
                kind=read.choice("kind", KINDS),
                label=read.text("label"),
                bytes=read.optional_count("bytes"),
                full_bytes=read.count("full_bytes"),
                bits_per_weight=read.optional_number("bits_per_weight"),
                fidelity=Fidelity.from_fields(fidelity) if fidelity else None,
                merge_survival=read.optional_number("merge_survival"),
                probes={name: Probe.from_fields(item, f"{where}.probes.{name}") for name, item in read.named("probes")},
                perplexity=Perplexity.from_fields(perplexity, f"{where}.perplexity") if perplexity else None,
                seconds=read.number("seconds"),
                seed=read.count("seed"),
                recipe=read.optional_text("recipe"),
                adaptive=read.optional_mapping("adaptive"),
                arm=read.optional_mapping("arm") or {},
                artifact=read.optional_text("artifact"),
                utility={name: Utility.from_fields(item) for name, item in read.named("utility")},
            )
        for role in SINGLE_ROLES:
            if (count := sum(probe.role == role for probe in cell.probes.values())) != 1:
                raise RunError(f"{where} has {count} probes of role {role!r} where exactly one is needed.")
        return cell

    def name_of(self, role: str) -> str:
        """The name of the one probe of a single role (`goal`, `skill` or `over_refusal`)."""
        return next(name for name, probe in self.probes.items() if probe.role == role)

    def probe_of(self, role: str) -> Probe:
        """The one probe of a single role (`goal`, `skill` or `over_refusal`)."""
        return self.probes[self.name_of(role)]
