"""What routes ask of whatever answers and keeps the tenants: in this process, or on the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from deltakeeper.engine import EngineStats, Request
from deltakeeper.engine.stream import Stream
from deltakeeper.engine.tenant_records import Source, State
from deltakeeper.engine.tenant_stats import StoreStats


class ServedBase(Protocol):
    """The base model, as far as requests are read with it; its weights may be elsewhere."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, of transformers."""

    @property
    def path(self) -> Path:
        """Its folder."""

    @property
    def root(self) -> str:
        """Fingerprint of its checkpoint."""


class AnsweringEngine(Protocol):
    """What answers; see `deltakeeper.engine.Engine` for what each member promises and raises."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer of one request."""

    @property
    def alive(self) -> bool:
        """Whether requests are served; once it is false, only a restart helps."""

    def submit(self, request: Request, wake: Callable[[], None] | None = None) -> Stream:
        """Hand in a request."""

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those there are."""

    def close(self) -> None:
        """Stop, and end open requests as cancelled."""

    def stats(self) -> EngineStats:
        """A reading of all counters."""


class HeldTenant(Protocol):
    """A version of a tenant that is served, for as long as the `with` block lasts."""

    @property
    def version(self) -> str:
        """Identity of its content."""

    @property
    def delta(self) -> Any:
        """With `vocabulary`, `side_folder` and `side_files`."""

    def __enter__(self) -> HeldTenant: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class TenantPlaces(Protocol):
    """Tenants by name; see `deltakeeper.engine.store.TenantStore` for what each member promises and raises."""

    @property
    def max_delta_bytes(self) -> int:
        """Most bytes of one delta, which has to be held in one place."""

    def names(self) -> list[str]:
        """All known names, sorted."""

    def state(self, name: str) -> State:
        """State of a tenant."""

    def source(self, name: str) -> Source:
        """What the next load of a tenant reads."""

    def stats(self) -> StoreStats:
        """Counts of this moment."""

    def acquire(self, name: str) -> HeldTenant | None:
        """The version that a tenant has now, or None where it has to be loaded first."""

    def load(self, name: str) -> Future[str]:
        """Load a tenant; the future gives its version."""

    def register(self, name: str, path: Path, *, planes: int | None = None) -> None:
        """Make a tenant known, cold."""

    def scan(self) -> list[str]:
        """Make every subfolder that holds an artifact known by its name."""

    def replace(self, name: str, path: Path, *, planes: int | None = None) -> Future[str]:
        """Load another artifact for a name, and turn the name over to it once it is loaded."""

    def unload(self, name: str) -> None:
        """Free a tenant's memory; the next request loads it again."""

    def remove(self, name: str) -> None:
        """Forget a name."""
