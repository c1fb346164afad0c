"""What the files of a delta say, held against the policy: before anything of it is in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deltakeeper.artifact import STATEMENT_SUFFIX, DeltaArtifact
from deltakeeper.attestation import Statement, verify_statement
from deltakeeper.attestation.statement import Measured
from deltakeeper.errors import AttestationError
from deltakeeper.layouts import Signs
from deltakeeper.service.admission.policy import AttestationRules, PolicyFile
from deltakeeper.service.admission_port import Verdict

_PART = re.compile(r"\+(?=[a-z])")  # a sum of codecs is spelled a+b, and a setting may hold 1e+2


@dataclass(frozen=True)
class Finding:
    """What policy says of an artifact's files.

    Attributes:
        verdict: as in `Decision`, before any canary.
        planes: sign planes that may be served; None for all.
        reasons: sentences.
        expires: when the statement that it rests on becomes too old; None if it rests on none or that may be of any
            age.
    """

    verdict: Verdict
    planes: int | None = None
    reasons: tuple[str, ...] = ()
    expires: datetime | None = None


def inspect(file: PolicyFile, artifact: DeltaArtifact, base_root: str, now: datetime | None = None) -> Finding:
    """Hold an artifact's files against a policy.

    Args:
        file: the policy.
        artifact: opened, headers checked.
        base_root: fingerprint of the base that is served.
        now: the present; what the clock says by default.
    """
    if reasons := tuple(_faults(file, artifact, base_root)):
        return Finding("refused", reasons=reasons)
    rules = file.policy.attestation
    if rules is None:
        return Finding("admitted")
    beside = statement_of(artifact.path)
    if not beside.is_file():
        return _unattested(file, artifact, beside)
    try:
        statement = _verified(file, beside, artifact, base_root, now or datetime.now(UTC))
    except AttestationError as error:
        return Finding("refused", reasons=(str(error),))
    reasons = tuple(_unmet(rules, statement))
    expires = None if rules.max_age is None else statement.date + rules.max_age
    return Finding("refused" if reasons else "admitted", None, reasons, expires)


def statement_of(folder: Path) -> Path:
    """Where the statement of an artifact is looked for: beside its folder, or beside what a link leads to."""
    real = folder.resolve()
    return real.with_name(real.name + STATEMENT_SUFFIX)


def stored_planes(artifact: DeltaArtifact) -> int:
    """Most sign planes of a tensor; 0 where there are none."""
    terms = (term for record in artifact.manifest.tensors.values() for term in record.terms)
    return max((int(term.settings["planes"]) for term in terms if term.layout == Signs.name), default=0)


def describe(artifact: DeltaArtifact) -> dict[str, Any]:
    """What an artifact's headers say, for whoever manages it."""
    return {
        "codec": artifact.manifest.codec,
        "bytes": artifact.nbytes,
        "stored_planes": stored_planes(artifact),
        "base_root": artifact.manifest.base.root,
        "manifest_sha256": artifact.manifest_sha256,
    }


def undimmed(artifact: DeltaArtifact) -> str | None:
    """A matrix that fewer planes would not make any coarser, if there is one: it is stored otherwise."""
    for name, record in artifact.manifest.tensors.items():
        if len(record.shape) >= 2 and any(term.layout != Signs.name for term in record.terms):
            return name
    return None


def _faults(file: PolicyFile, artifact: DeltaArtifact, base_root: str) -> Iterator[str]:
    policy, manifest = file.policy, artifact.manifest
    if policy.base_root is not None and manifest.base.root != policy.base_root:
        yield f"It is for the base {manifest.base.root[:12]}…, and policy asks for {policy.base_root[:12]}…."
    elif manifest.base.root != base_root:
        yield f"It is for the base {manifest.base.root[:12]}…, and {base_root[:12]}… is served."
    if policy.codecs is not None:
        spelled = {manifest.codec, *(record.codec for record in manifest.tensors.values() if record.codec)}
        names = {part.partition(":")[0] for text in spelled for part in _PART.split(text)}
        if odd := sorted(names - set(policy.codecs)):
            yield f"Its codec is {odd[0][:80]!r}, and policy allows {', '.join(policy.codecs)}."
    if policy.layouts is not None:
        for name, record in manifest.tensors.items():
            kinds = {term.layout for term in record.terms} if len(record.shape) >= 2 else set()
            if odd := sorted(kinds - set(policy.layouts)):
                yield f"Its matrix {name[:80]} is stored as {odd[0]}, and policy allows {', '.join(policy.layouts)}."
                break
    nbytes = artifact.nbytes + artifact.side_bytes
    if policy.max_bytes is not None and nbytes > policy.max_bytes:
        yield f"It has {nbytes:,} bytes, and policy allows {int(policy.max_bytes):,}."


def _unattested(file: PolicyFile, artifact: DeltaArtifact, beside: Path) -> Finding:
    unattested = file.policy.unattested
    if unattested is None:
        return Finding("refused", reasons=(f"There is no signed statement {beside.name} beside it.",))
    planes = unattested.planes
    if other := undimmed(artifact):
        reason = (
            f"Without a signed statement it is served at {_planes(planes)} only, and its matrix {other[:80]} is "
            "stored in no planes."
        )
        return Finding("refused", reasons=(reason,))
    return Finding("quarantined", planes, (f"Without a signed statement it is served at {_planes(planes)} at most.",))


def _verified(file: PolicyFile, beside: Path, artifact: DeltaArtifact, base_root: str, now: datetime) -> Statement:
    """The statement, if one of the keys signed it; what is said of the last key where none did."""
    assert file.policy.attestation is not None
    refusal: AttestationError | None = None
    for key in file.public_keys:
        try:
            statement = verify_statement(
                beside, artifact.path, key, max_age=file.policy.attestation.max_age, base_root=base_root, now=now
            )
        except AttestationError as error:
            refusal = error
        else:
            if statement.manifest_sha256 == artifact.manifest_sha256:
                return statement
            refusal = AttestationError(f"{artifact.path} changed while it was looked at; try again.")
    assert refusal is not None
    raise refusal


def _unmet(rules: AttestationRules, statement: Statement) -> Iterator[str]:
    if rules.evidence == "adaptive" and statement.predicate.evidence != "adaptive":
        yield "No attacker who knows the codec was tried on it, and policy asks for that."
    spoken = [statement.predicate.measurement]
    if rules.whole_study:
        spoken += statement.predicate.study
    for measured in spoken:
        for name, bound in rules.at_most.items():
            high = _end(measured, name, "high")
            if high is None or high > bound:
                yield f"{_said(measured, name, 'at most', high)}, and policy asks for at most {bound:g}."
        for name, bound in rules.at_least.items():
            low = _end(measured, name, "low")
            if low is None or low < bound:
                yield f"{_said(measured, name, 'at least', low)}, and policy asks for at least {bound:g}."


def _end(measured: Measured, name: str, end: str) -> float | None:
    number = measured.metrics.get(name)
    found: float | None = None if number is None else getattr(number, end)
    return found


def _said(measured: Measured, name: str, way: str, value: float | None) -> str:
    what = "not measured" if value is None else f"shown to be {way} {value:.3g}"
    return f"Under the attack {measured.attack[:80]!r} its {name} is {what}"


def _planes(count: int) -> str:
    return "1 sign plane" if count == 1 else f"{count} sign planes"
