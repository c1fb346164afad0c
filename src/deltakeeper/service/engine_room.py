"""An engine over a base in memory, with the store that its tenants come from and the policy that lets them in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deltakeeper.engine import Engine, EngineSettings
from deltakeeper.engine.store import TenantStore
from deltakeeper.live_base import LiveBase
from deltakeeper.overlay import attach
from deltakeeper.service.admission import DecisionLog, PolicyAdmission
from deltakeeper.service.admission.policy import PolicyFile
from deltakeeper.service.tenant_text import TextGuard


@dataclass(frozen=True)
class Room:
    """What runs.

    Attributes:
        engine: with its thread started.
        store: where its tenants come from; it knows none yet.
        admission: the policy; None where whatever fits the base gets in.
    """

    engine: Engine
    store: TenantStore
    admission: PolicyAdmission | None


@contextmanager
def opened_room(
    base: LiveBase,
    deltas: Path | None,
    *,
    delta_bytes: int,
    loaders: int,
    engine: EngineSettings,
    policy: PolicyFile | None,
    decisions: Path,
    with_defaults: bool,
) -> Iterator[Room]:
    """Run an engine until the block ends.

    Args:
        base: what it answers with.
        deltas: the folder that the store scans, if anybody lets it.
        delta_bytes: memory of all deltas together.
        loaders: threads that load deltas.
        engine: its sizes.
        policy: what a delta must show; None lets in whatever fits the base.
        decisions: file that a policy's decisions are appended to.
        with_defaults: whether deltas say how tokens are drawn where a request does not.

    Raises:
        DataError: the log of decisions, or a file that the policy names, cannot be used.
        EngineError: a size is out of range.
    """
    with ExitStack() as stack:
        overlay = attach(base.model)
        stack.callback(overlay.detach)
        admission = None
        if policy is not None:
            admission = PolicyAdmission(policy, base.root, DecisionLog(decisions))
            stack.callback(admission.close)
        read = TextGuard(overlay, base.tokenizer, with_defaults=with_defaults)
        guarded = read if admission is None else admission.guard(read)
        store = stack.enter_context(
            TenantStore(guarded, deltas, byte_budget=delta_bytes, loaders=loaders, base_root=base.root)
        )
        tenants = store if admission is None else admission.tenants(store)
        running = stack.enter_context(
            Engine(base.model, base.tokenizer, overlay=overlay, store=tenants, settings=engine)
        )
        running.start()
        if admission is not None:
            admission.probe_with(running, base.tokenizer)
        yield Room(running, store, admission)
