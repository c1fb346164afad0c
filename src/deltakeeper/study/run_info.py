"""Where the numbers of a run come from, as frozen records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from deltakeeper.study.fields import Fields, check_version

RUN_VERSION = 2


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
    """How one attack was made.

    `title` and `summary` are for people; `settings` are those of the training, `sizes` those of the sets. `recipe` is
    the id of the recipe and `recipe_sha256` the hash of its content, None for an attack that was given in code;
    `source` is where it was published. `seeds` are the seeds that it was trained with.
    """

    title: str
    summary: str
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    recipe_sha256: str | None = None
    source: str = ""
    seeds: tuple[int, ...] = (0,)

    @classmethod
    def from_fields(cls, fields: Fields) -> AttackInfo:
        """Read an attack's description; raises RunError on a missing, unknown or malformed field."""
        with fields as read:
            return cls(
                title=read.text("title"),
                summary=read.text("summary"),
                settings=read.scalars("settings"),
                sizes=read.scalars("sizes"),
                recipe=read.optional_text("recipe"),
                recipe_sha256=read.optional_text("recipe_sha256"),
                source=read.text("source"),
                seeds=read.counts("seeds"),
            )


@dataclass(frozen=True)
class RunInfo:
    """Where the numbers of a run come from.

    `model` holds the base's `name` and, once it is known, the `root` of its fingerprint; `study` is the study's name.
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
    study: str = "demo"

    def to_json(self) -> dict[str, Any]:
        """The run's description as a JSON object with its version."""
        return {"version": RUN_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any, where: str = "run") -> RunInfo:
        """Read a run's description strictly; raises RunError that names `where` and the field at fault."""
        with Fields(value, where) as read:
            check_version(read, where, RUN_VERSION)
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
                study=read.text("study"),
            )
