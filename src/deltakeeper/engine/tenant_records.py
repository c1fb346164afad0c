"""What the tenant store remembers: tenants by name, the versions of each, and what it asks of an overlay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.engine.tenant_files import LoadingArtifact
from deltakeeper.errors import TenantError

State = Literal["cold", "loading", "resident", "draining", "failed"]
Stage = Literal["opening", "waiting", "reading", "ready", "publishing", "published", "draining", "leaving", "gone"]


class Delta(Protocol):
    """A tenant's delta in memory, as the overlay loads it."""

    @property
    def version(self) -> str:
        """Identity of its content, lower-case hex; never a name or a path."""

    @property
    def nbytes(self) -> int:
        """Bytes that it really holds."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens that it knows."""

    @property
    def side_folder(self) -> Path:
        """Folder of its tokenizer, chat template and generation config."""

    @property
    def side_files(self) -> Mapping[str, str]:
        """Names of those files, each with the SHA-256 that it had when the delta was loaded."""

    def close(self) -> None:
        """Give its memory back."""


class TenantOverlay(Protocol):
    """What the store needs of a live model: read beside it, and show and hide deltas between its passes."""

    def load(self, artifact: DeltaArtifact, *, planes: int | None = None) -> Delta:
        """Read a delta and make it ready; slow, on any thread, and nothing live is touched."""

    def publish(self, delta: Any, /) -> int:
        """Make a delta usable, and say in which slot; fast."""

    def retire(self, slot: int, /) -> Delta:
        """Free a slot that no request uses; fast."""


@dataclass(frozen=True)
class Source:
    """Where a version comes from: the artifact's folder, and how many sign planes are served (None: all)."""

    path: Path
    planes: int | None


@dataclass(frozen=True)
class StoreSettings:
    """Limits of the store; see `TenantStore`.

    Raises:
        TenantError: one of them is out of range.
    """

    byte_budget: int
    loaders: int = 1
    base_root: str | None = None
    max_resident: int | None = None
    backoff_seconds: float = 1.0
    backoff_limit: float = 60.0
    grace_seconds: float = 2.0

    def __post_init__(self) -> None:
        for name, low in (("byte_budget", 1), ("loaders", 0), ("max_resident", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise TenantError(f"The tenant store has {name}={value}; give {low} or more.")
        for name in ("backoff_seconds", "backoff_limit", "grace_seconds"):
            if not getattr(self, name) >= 0:
                raise TenantError(f"The tenant store has {name}={getattr(self, name)}; give 0 seconds or more.")


@dataclass(eq=False)
class Tenant:
    """A name and what stands behind it.

    Attributes:
        name: as requests give it.
        source: what the next load reads.
        current: the version that new requests get.
        incoming: the version that is being loaded.
        learned: payload bytes and bytes really held of the last load, which size the next reservation.
        reason: why the last load failed, empty after one that did not.
        unusable: whether that was its files' fault or its size, so that only other files or more memory help.
        failed_in_a_row: loads that failed since the last that did not; sets the back-off.
        retry_at: clock time before which a request is refused with `reason`.
    """

    name: str
    source: Source
    current: Version | None = None
    incoming: Version | None = None
    learned: tuple[Source, int, int] | None = None
    disk_bytes: int = 0
    read_ahead: bool = False
    reason: str = ""
    unusable: bool = False
    failed_in_a_row: int = 0
    retry_at: float = 0.0
    failures: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    evictions: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class Version:
    """One load of a tenant, from its first header to the end of its memory.

    Attributes:
        wanted: bytes that it needs by what is known so far.
        held: bytes accounted to it: a reservation until `settled`, then the delta's own count.
        placed: whether it counts towards the number of residents.
        staged: whether it is pinned for whoever asked for it, who turns its name over to it; its load does not.
        abandoned: whether nobody wants the outcome of its load any more.
        overtaken: how many versions that came later were let in before it.
        fresh_until: clock time until which it is kept though no request has come for it yet.
    """

    tenant: Tenant
    source: Source
    staged: bool = False
    stage: Stage = "opening"
    artifact: LoadingArtifact | None = None
    delta: Delta | None = None
    payload_bytes: int = 0
    wanted: int = 0
    held: int = 0
    settled: bool = False
    placed: bool = False
    slot: int = 0
    pins: int = 0
    last_used: int = 0
    overtaken: int = 0
    fresh_until: float = 0.0
    seconds: float = 0.0
    abandoned: bool = False
    done: Future[str] = field(default_factory=Future)

    @property
    def coming(self) -> bool:
        """Whether the outcome of its load is still open."""
        return self.stage in ("opening", "waiting", "reading", "ready", "publishing")

    @property
    def going(self) -> bool:
        """Whether its bytes come free without anybody's doing."""
        return self.stage == "leaving" or (self.stage == "draining" and not self.pins)
