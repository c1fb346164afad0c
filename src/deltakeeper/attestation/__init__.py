"""Attestations: signed statements that bind an artifact to what was measured of it."""

from deltakeeper.attestation.admission import verify_statement
from deltakeeper.attestation.keys import make_keys
from deltakeeper.attestation.making import attest
from deltakeeper.attestation.statement import Statement

__all__ = ["Statement", "attest", "make_keys", "verify_statement"]
