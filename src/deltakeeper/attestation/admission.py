"""Admission: whether a statement holds for an artifact, which a server asks before it loads one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from deltakeeper.attestation.envelope import read_envelope, unseal
from deltakeeper.attestation.keys import read_public_key
from deltakeeper.attestation.statement import Statement
from deltakeeper.attestation.subject import check_files
from deltakeeper.errors import AttestationError

CLOCK_SKEW = timedelta(minutes=5)
"""How far in the future a statement may lie, since clocks differ."""


def verify_statement(
    path: Path | str,
    artifact: Path | str,
    public_key: Path | str,
    *,
    max_age: timedelta | None = None,
    base_root: str | None = None,
    now: datetime | None = None,
) -> Statement:
    """Check that a statement was signed with a key and is of this very artifact; nothing is asked of the network.

    The signature is checked before anything that it covers is read. What was checked is what lay in the folder at that
    time: a loader that opens the artifact afterwards compares `DeltaArtifact.manifest_sha256`, which covers every
    weight, with `Statement.manifest_sha256`.

    Args:
        path: the statement's file.
        artifact: folder of the artifact; it may hold the attested files and no other.
        public_key: key that must have signed, in PEM.
        max_age: oldest statement that is taken; any age by default.
        base_root: fingerprint that the base must have; that of the artifact by default.
        now: the present; what the clock says by default.

    Returns:
        The statement, whose measurements may now be believed as far as its signer is.

    Raises:
        AttestationError: one sentence on what does not hold.
    """
    file = Path(path)
    payload = unseal(read_envelope(file), read_public_key(public_key), str(file))
    statement = Statement.from_payload(payload, str(file))
    if base_root is not None and statement.base_root != base_root:
        raise AttestationError(
            f"{file} is of a delta of the base {statement.base_root[:12]}, and the base here is {base_root[:12]}; "
            "give an artifact of this base."
        )
    _check_age(statement, file, max_age, now or datetime.now(UTC))
    check_files(statement, Path(artifact))
    return statement


def _check_age(statement: Statement, file: Path, max_age: timedelta | None, now: datetime) -> None:
    age = now - statement.date
    if age < -CLOCK_SKEW:
        raise AttestationError(f"{file} is dated in the future ({statement.predicate.date}); check the clocks.")
    if max_age is not None and age > max_age:
        raise AttestationError(
            f"{file} is of {statement.predicate.date}, older than the {_spoken(max_age)} allowed; have it signed anew."
        )


def _spoken(age: timedelta) -> str:
    hours = age.total_seconds() / 3600
    return f"{hours / 24:.3g} days" if hours >= 48 else f"{hours:.3g} hours"
