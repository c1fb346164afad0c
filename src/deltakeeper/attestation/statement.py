"""What is signed: an in-toto Statement whose subject is the artifact and whose predicate is what was measured of it.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    StringConstraints,
    ValidationError,
    field_validator,
)

from deltakeeper.attestation.strict_json import canonical, parse_canonical
from deltakeeper.errors import AttestationError
from deltakeeper.study.summary import Number

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_NAME = "urn:deltakeeper:attestation:measured-delta"
PREDICATE_VERSION = "v1"
PREDICATE_TYPE = f"{PREDICATE_NAME}:{PREDICATE_VERSION}"
"""Type of the predicate; a change that a reader of this one would misread is a new version."""
MAX_FILES = 10_000

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$", strict=True)]
Text = Annotated[str, StringConstraints(max_length=2_000, strict=True)]


class Part(BaseModel):
    """A frozen part of a statement that takes no field it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class Digest(Part):
    """Hash of one file."""

    sha256: Sha256


class Subject(Part):
    """One file of the artifact, by its path in the folder."""

    name: Text
    digest: Digest

    @field_validator("name")
    @classmethod
    def _inside(cls, name: str) -> str:
        if not name or not name.isprintable() or "\\" in name or str(PurePosixPath(name)) != name:
            raise ValueError("is no plain path of a file")
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError("leaves the folder")
        return name


class Artifact(Part):
    """The artifact: hash of its manifest, fingerprint of the base that it belongs to, codec, and bytes."""

    manifest_sha256: Sha256
    base_root: Sha256
    base: Text
    codec: Text
    bytes: Annotated[StrictInt, Field(ge=0)]


class Prompts(Part):
    """One prompt set: how many, and the hash of their ids and texts in the order of the ids."""

    count: Annotated[StrictInt, Field(ge=1)]
    sha256: Sha256


class Measured(Part):
    """What was measured of one arm of one attack.

    In `measurement` it is the attested artifact itself under its own seed; in `study` it is the arm over all seeds.
    `metrics` are shares or differences of shares with their 95 % intervals; `loss_bound` is the one-sided bound of the
    loss of skill.
    """

    attack: Text
    family: Text
    variant: Text
    kind: Text
    label: Text
    seeds: tuple[StrictInt, ...]
    recipe_sha256: Sha256 | None
    adaptive: dict[str, Any] | None
    metrics: dict[Text, Number]
    loss_bound: float | None


class JudgedBy(Part):
    """A judge: its name, the version of its rule, and the hash of its file."""

    name: Text
    version: Text
    sha256: Text


class Tool(Part):
    """What measured and signed."""

    name: Literal["deltakeeper"]
    version: Text


class Predicate(Part):
    """What is said of the subject.

    `evidence` is `adaptive` only where an attacker who knows the codec was tried on the arm; `run_sha256` is the hash
    of the measured cell, so that a statement can be held against the run folder.
    """

    artifact: Artifact
    measurement: Measured
    prompts: dict[Text, Prompts]
    study: tuple[Measured, ...] = ()
    evidence: Literal["non-adaptive", "adaptive"]
    judges: tuple[JudgedBy, ...]
    model: Text
    command: Text
    cell_sha256: Sha256
    tool: Tool
    date: Text

    @field_validator("date")
    @classmethod
    def _is_date(cls, date: str) -> str:
        if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", date):
            raise ValueError("is no time in UTC such as 2026-01-31T12:00:00Z")
        datetime.fromisoformat(date)
        return date


class Statement(Part):
    """An in-toto Statement v1 over the files of one artifact."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(default="https://in-toto.io/Statement/v1", alias="_type")
    subject: Annotated[tuple[Subject, ...], Field(min_length=1, max_length=MAX_FILES)]
    predicate_type: StrictStr = Field(default=PREDICATE_TYPE, alias="predicateType")
    predicate: Predicate

    @field_validator("subject")
    @classmethod
    def _each_once(cls, subject: tuple[Subject, ...]) -> tuple[Subject, ...]:
        names = [file.name for file in subject]
        if names != sorted(set(names)):
            raise ValueError("lists its files twice or out of order")
        return subject

    @property
    def manifest_sha256(self) -> str:
        """Hash of the artifact's manifest: what a loader that opens the artifact itself holds its own against."""
        return self.predicate.artifact.manifest_sha256

    @property
    def base_root(self) -> str:
        """Fingerprint of the base that the artifact belongs to."""
        return self.predicate.artifact.base_root

    @property
    def date(self) -> datetime:
        """When it was signed, in UTC."""
        return datetime.fromisoformat(self.predicate.date)

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of every file by its path."""
        return {file.name: file.digest.sha256 for file in self.subject}

    def payload(self) -> bytes:
        """The bytes that are signed."""
        return canonical(self.model_dump(mode="json", by_alias=True))

    @classmethod
    def from_payload(cls, raw: bytes, where: str) -> Statement:
        """Read a statement strictly.

        Raises:
            AttestationError: it is no in-toto Statement v1, of another predicate or version of it, or malformed.
        """
        value = parse_canonical(raw, where)
        if not isinstance(value, dict) or value.get("_type") != STATEMENT_TYPE:
            raise AttestationError(f"{where} is no in-toto Statement v1; give a file that `attest sign` wrote.")
        kind = value.get("predicateType")
        if kind != PREDICATE_TYPE:
            newer = isinstance(kind, str) and kind.startswith(PREDICATE_NAME + ":")
            what = "version of the predicate" if newer else "predicate"
            raise AttestationError(
                f"{where} has the {what} {str(kind)[:120]!r} and this deltakeeper reads {PREDICATE_TYPE}; "
                f"{'use the release that wrote it' if newer else 'give a statement of deltakeeper'}."
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))[:200]
            raise AttestationError(f"{where}: {place}: {first['msg'].lower()}; have it signed again.") from error
