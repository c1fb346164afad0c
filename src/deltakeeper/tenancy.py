"""Deltas on a live base for the length of a `with` block, ready for an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.engine.fixed_tenants import FixedTenants
from deltakeeper.overlay import Overlay, TenantDelta, attach


@dataclass(frozen=True)
class Tenancy:
    """A live base and the tenants on it.

    Attributes:
        overlay: what makes the base know them.
        deltas: what each of them holds, by name.
        tenants: the same for an engine.
    """

    overlay: Overlay
    deltas: dict[str, TenantDelta]
    tenants: FixedTenants


@contextmanager
def published(model: Any, artifacts: Mapping[str, DeltaArtifact], *, planes: int | None = None) -> Iterator[Tenancy]:
    """Load deltas and publish them; afterwards the model is as before, and their memory is free.

    Engines over it have to be closed before the block ends.

    Args:
        model: a live Hugging Face decoder, the base of all artifacts; the caller compares their hashes.
        artifacts: what each tenant is made of, by name.
        planes: sign planes to serve; all by default.

    Raises:
        OverlayError: an artifact does not fit the live model.
        ArtifactError: a payload was altered.
    """
    overlay = attach(model)
    deltas: dict[str, TenantDelta] = {}
    try:
        slots = {}
        for name, artifact in artifacts.items():
            deltas[name] = overlay.load(artifact, planes=planes)
            slots[name] = overlay.publish(deltas[name])
        yield Tenancy(overlay, deltas, FixedTenants({name: (slots[name], delta) for name, delta in deltas.items()}))
    finally:
        overlay.detach()
        for delta in deltas.values():
            delta.close()
