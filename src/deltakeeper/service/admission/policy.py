"""The policy file: what a delta must show to be served."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, ConfigDict, Field, StringConstraints, model_validator

from deltakeeper.attestation.keys import read_public_key
from deltakeeper.errors import DataError
from deltakeeper.evals.judges.settings import Settings, check, parse_mapping, read_bytes
from deltakeeper.layouts import LAYOUTS

Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, StringConstraints(min_length=1)]


class Part(Settings):
    """A frozen part of the policy that knows no other keys than its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class AttestationRules(Part):
    """What a signed statement must say (docs/attestation.md).

    Attributes:
        public_keys: files of keys, one of which must have signed; relative to the policy file.
        max_age_days: oldest statement that is taken; any age by default.
        at_most: metrics, and what the upper end of the 95 % interval of each may be: risk.
        at_least: metrics, and what the lower end of the interval of each must reach: utility.
        whole_study: hold the bounds against every attack that the run tried on the arm, not on this artifact alone.
        evidence: `adaptive` demands that an attacker who knows the codec was tried.
    """

    public_keys: tuple[Name, ...] = Field(min_length=1)
    max_age_days: Annotated[float, Field(gt=0)] | None = None
    at_most: dict[Name, float] = Field(default_factory=dict)
    at_least: dict[Name, float] = Field(default_factory=dict)
    whole_study: bool = False
    evidence: Literal["any", "adaptive"] = "any"

    @property
    def max_age(self) -> timedelta | None:
        """Oldest statement that is taken, if there is a bound."""
        return None if self.max_age_days is None else timedelta(days=self.max_age_days)


class Unattested(Part):
    """What becomes of a delta without a statement: it is served at this many sign planes."""

    planes: Annotated[int, Field(ge=1)]


class CanaryRules(Part):
    """The probe set that a delta answers once it is loaded, before anybody else may ask it.

    A share over `count` prompts is known to about ±1/√count, so leave room between a bound and what is usual.

    Attributes:
        prompts: `harmful`, the packaged held-out requests, or a prompt file, relative to the policy file.
        count: prompts that are asked, categories in turn.
        new_tokens: length at which an answer is cut.
        system: system message; None leaves it to the chat template.
        judge: what decides of refusals: `ours` or a judge's file (docs/judges.md).
        refusals_at_least: share of the prompts that must be refused.
        drop_at_most: by how much that share may be below the base's on the same prompts.
        broken_at_most: share of answers that may be empty or incoherent.
        failing: what becomes of a delta that fails; one that is quarantined must pass at its fewer planes.
        planes: sign planes of one that is quarantined.
        seconds: how long all prompts together may take.
    """

    prompts: Name = "harmful"
    count: Annotated[int, Field(ge=1, le=1000)] = 32
    new_tokens: Annotated[int, Field(ge=1, le=512)] = 32
    system: str | None = None
    judge: Name = "ours"
    refusals_at_least: Share | None = None
    drop_at_most: Share | None = None
    broken_at_most: Share = 0.5
    failing: Literal["refuse", "quarantine"] = "refuse"
    planes: Annotated[int, Field(ge=1)] = 1
    seconds: Annotated[float, Field(gt=0)] = 120.0

    @model_validator(mode="after")
    def _has_bound(self) -> CanaryRules:
        if self.refusals_at_least is None and self.drop_at_most is None:
            raise ValueError("give refusals_at_least or drop_at_most, or it could not fail")
        return self


class Policy(Part):
    """What a delta must show; each part that is left out asks nothing.

    Attributes:
        base_root: fingerprint of the base that deltas are for; the served base's by default.
        codecs: names of codecs that a manifest may claim.
        layouts: layouts in which a matrix may really be stored.
        max_bytes: of all files of an artifact; a number, or text such as `2GiB`.
        attestation: what a signed statement must say.
        unattested: what becomes of a delta without one; refused by default.
        canary: what it must do once it is loaded.
    """

    base_root: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    codecs: tuple[Name, ...] | None = None
    layouts: tuple[Name, ...] | None = None
    max_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    attestation: AttestationRules | None = None
    unattested: Unattested | None = None
    canary: CanaryRules | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Policy:
        if self.unattested is not None and self.attestation is None:
            raise ValueError("unattested says what happens without a statement, so attestation must say which counts")
        if odd := sorted(set(self.layouts or ()) - set(LAYOUTS)):
            raise ValueError(f"there is no layout {odd[0]!r:.80}; choose among {', '.join(sorted(LAYOUTS))}")
        return self


@dataclass(frozen=True)
class PolicyFile:
    """A policy as it was read.

    Attributes:
        policy: what it says.
        folder: what paths in it are relative to.
        sha256: hash of the file, which the log of decisions names.
    """

    policy: Policy
    folder: Path
    sha256: str

    def path(self, text: str) -> Path:
        """A path that the policy names."""
        return self.folder / text

    @property
    def public_keys(self) -> tuple[Path, ...]:
        """Keys that may have signed."""
        rules = self.policy.attestation
        return () if rules is None else tuple(map(self.path, rules.public_keys))


def read_policy(path: Path) -> PolicyFile:
    """Read a policy, and see that all that it names is there.

    Raises:
        DataError: there is no such file, or a key or value in it cannot be used.
        AttestationError: a public key cannot be read.
    """
    raw = read_bytes(path, "policy")
    policy = check(Policy, parse_mapping(raw, str(path)) if raw.strip() else {}, str(path))
    found = PolicyFile(policy, path.parent, hashlib.sha256(raw).hexdigest())
    for key in found.public_keys:
        if not key.is_file():
            raise DataError(f"{path} names the public key {key}, which is not there; correct the path.")
        read_public_key(key)
    return found
