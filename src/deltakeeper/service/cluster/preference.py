"""Which replicas a tenant prefers, by their names alone (rendezvous hashing)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def ranked(tenant: str, replicas: Iterable[str]) -> list[str]:
    """Ids of replicas, the one that a tenant prefers first; each keeps its rank whichever others there are."""
    return sorted(replicas, key=lambda replica: hashlib.sha256(f"{tenant}\n{replica}".encode()).digest())
