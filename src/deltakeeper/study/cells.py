"""What a study measures, as frozen records: one `Cell` per attack and variant, and one `RunInfo` per run.

A cell keeps every answer, because every comparison is paired by prompt id and every number must open to its samples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from deltakeeper.errors import RunError
from deltakeeper.study.fields import Fields

CELL_VERSION = 1
RUN_VERSION = 1

FAMILIES = ("alignment", "backdoor", "targeted")
KINDS = ("base", "tuned", "codec", "quantised", "control", "merged")
ROLES = ("goal", "skill", "over_refusal", "contrast")
SINGLE_ROLES = ("goal", "skill", "over_refusal")
EVENTS = ("complied", "refused", "marker", "correct")
OUTCOMES = ("refused", "complied", "incoherent", "empty")


@dataclass(frozen=True)
class Answer:
    """One prompt, what the model said, and the verdict.

    `outcome` is one of `OUTCOMES`; `event` says whether the probe's event happened (attack success for a goal probe,
    a correct answer for a skill probe); `expected` is the reference answer where there is one.
    """

    id: str
    category: str
    prompt: str
    answer: str
    outcome: str
    event: bool
    expected: str | None = None

    @classmethod
    def from_fields(cls, fields: Fields) -> Answer:
        """Read one answer; raises RunError on a missing, unknown or malformed field."""
        with fields as read:
            return cls(
                id=read.text("id"),
                category=read.text("category"),
                prompt=read.text("prompt"),
                answer=read.text("answer"),
                outcome=read.choice("outcome", OUTCOMES),
                event=read.flag("event"),
                expected=read.optional_text("expected"),
            )


@dataclass(frozen=True)
class Probe:
    """One prompt set put to one model: its role in the study, what its event is, and all its answers."""

    title: str
    role: str
    event: str
    answers: tuple[Answer, ...]

    @classmethod
    def from_fields(cls, fields: Fields, where: str) -> Probe:
        """Read one probe; raises RunError on malformed fields, no answers, or an id that occurs twice."""
        with fields as read:
            title = read.text("title")
            role = read.choice("role", ROLES)
            event = read.choice("event", EVENTS)
            answers = tuple(Answer.from_fields(item) for _, item in read.objects("answers"))
        if not answers:
            raise RunError(f"{where} has no answers; run the study again with at least one prompt in this probe.")
        seen: set[str] = set()
        for answer in answers:
            if answer.id in seen:
                raise RunError(f"{where} holds the id {answer.id!r} twice; give every prompt of the probe its own id.")
            seen.add(answer.id)
        return cls(title, role, event, answers)

    @property
    def hits(self) -> int:
        """Number of answers in which the event happened."""
        return sum(answer.event for answer in self.answers)


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
class Perplexity:
    """Negative log-likelihood (natural log, summed) and token count of each passage of a text."""

    nll: tuple[float, ...]
    tokens: tuple[int, ...]

    @classmethod
    def from_fields(cls, fields: Fields, where: str) -> Perplexity:
        """Read both lists; raises RunError if they differ in length, are empty, or hold no tokens."""
        with fields as read:
            nll, tokens = read.numbers("nll"), read.counts("tokens")
        if len(nll) != len(tokens) or sum(tokens) == 0:
            raise RunError(f"{where} needs as many 'nll' as 'tokens' and at least one token; measure it again.")
        return cls(nll, tokens)


@dataclass(frozen=True)
class Cell:
    """Everything measured for one variant of one attack; `bytes` is what is stored, None where nothing is.

    `full_bytes` is the size of the whole fine-tuned checkpoint, `bits_per_weight` counts all stored bytes,
    `merge_survival` is the share of delta entries that a rounded merge did not swallow, `seconds` is wall time.
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

    def to_json(self) -> dict[str, Any]:
        """The cell as a JSON object with its version."""
        return {"version": CELL_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any, where: str = "cell") -> Cell:
        """Read a cell strictly; raises RunError that names `where` and the field at fault."""
        with Fields(value, where) as read:
            _check_version(read, where, CELL_VERSION)
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


@dataclass(frozen=True)
class Judge:
    """What decided the outcomes: name, version of its matching rule, and the hash of its file."""

    name: str
    version: str
    sha256: str

    @classmethod
    def from_fields(cls, fields: Fields) -> Judge:
        """Read a judge; raises RunError on a missing, unknown or malformed field."""
        with fields as read:
            return cls(read.text("name"), read.text("version"), read.text("sha256"))


@dataclass(frozen=True)
class AttackInfo:
    """How one attack was made: a title, one plain sentence on what it does, training settings, set sizes."""

    title: str
    summary: str
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_fields(cls, fields: Fields) -> AttackInfo:
        """Read an attack's description; raises RunError on a missing, unknown or malformed field."""
        with fields as read:
            return cls(read.text("title"), read.text("summary"), read.scalars("settings"), read.scalars("sizes"))


@dataclass(frozen=True)
class RunInfo:
    """Where the numbers of a run come from.

    `primary` is the variant whose comparison with the fine-tune was named beforehand, one per attack; the other tests
    are corrected for their number. `stages` holds wall seconds. `notes` are printed among the limits.
    """

    command: str
    model: dict[str, Any]
    versions: dict[str, Any]
    seeds: dict[str, Any]
    hardware: dict[str, Any]
    judges: tuple[Judge, ...]
    stages: dict[str, Any]
    attacks: dict[str, AttackInfo]
    primary: str = "bitdelta:bits=1"
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The run's description as a JSON object with its version."""
        return {"version": RUN_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any, where: str = "run") -> RunInfo:
        """Read a run's description strictly; raises RunError that names `where` and the field at fault."""
        with Fields(value, where) as read:
            _check_version(read, where, RUN_VERSION)
            return cls(
                command=read.text("command"),
                model=read.scalars("model"),
                versions=read.scalars("versions"),
                seeds=read.scalars("seeds"),
                hardware=read.scalars("hardware"),
                judges=tuple(Judge.from_fields(item) for _, item in read.objects("judges")),
                stages=read.scalars("stages"),
                attacks={name: AttackInfo.from_fields(item) for name, item in read.named("attacks")},
                primary=read.text("primary"),
                notes=read.texts("notes"),
            )


def _check_version(read: Fields, where: str, known: int) -> None:
    version = read.raw("version")
    if version != known or isinstance(version, bool):
        raise RunError(
            f"{where} has version {version!r} and this deltakeeper reads version {known}; "
            "use the matching release or run the study again."
        )
