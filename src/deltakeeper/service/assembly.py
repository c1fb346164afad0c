"""A whole service from a base, a folder of deltas, a state and a policy: made in order, and taken apart in reverse."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastapi import APIRouter, FastAPI

from deltakeeper.engine import Engine, EngineSettings
from deltakeeper.engine.store import TenantStore
from deltakeeper.engine.tenant_records import TenantOverlay
from deltakeeper.errors import DataError, TenantError
from deltakeeper.live_base import LiveBase
from deltakeeper.loopback import is_loopback
from deltakeeper.overlay import attach
from deltakeeper.service import status
from deltakeeper.service.admission import DecisionLog, PolicyAdmission, read_policy
from deltakeeper.service.admission import decisions as decision_routes
from deltakeeper.service.admission import deltas as delta_routes
from deltakeeper.service.app import build_app
from deltakeeper.service.metrics import ServiceMetrics, metrics_router
from deltakeeper.service.running import Services
from deltakeeper.service.settings import ServiceSettings
from deltakeeper.service.tenancy import admin_keys
from deltakeeper.service.tenancy.database import State, open_state
from deltakeeper.service.tenancy.gate import StateGate
from deltakeeper.service.uploads import routes as upload_routes
from deltakeeper.service.web import page

_log = logging.getLogger("deltakeeper.service")
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Plan:
    """What to serve, and within which limits.

    Attributes:
        deltas: folder of the tenants' artifacts.
        state: file or URL of keys, quotas and tenants.
        decisions: file that admission's decisions are appended to.
        base_name: name by which requests ask the base.
        host: address that will be listened on; keys are needed unless it is this machine's own.
        policy: file that says what a delta must show; None lets in whatever fits the base.
        delta_bytes: memory of all deltas together.
        loaders: threads that load deltas.
        public_metrics: whether `/metrics`, which names tenants, is open to all instead of to admin keys.
        engine: sizes of the engine.
        settings: limits of requests.
    """

    deltas: Path
    state: str | Path
    decisions: Path
    base_name: str
    host: str = "127.0.0.1"
    policy: Path | None = None
    delta_bytes: int = 4 << 30
    loaders: int = 1
    public_metrics: bool = False
    engine: EngineSettings = field(default_factory=EngineSettings)
    settings: ServiceSettings = field(default_factory=ServiceSettings)


@dataclass(frozen=True)
class Assembled:
    """A service that runs and needs only a server in front.

    Attributes:
        services: its parts.
        app: its application.
        open: whether everybody on this machine is let in, since no key was made yet.
        state: where its state is, without a password.
    """

    services: Services
    app: FastAPI
    open: bool
    state: str


@contextmanager
def assembled(base: LiveBase, plan: Plan) -> Iterator[Assembled]:
    """Run a service over a base in memory until the block ends.

    Raises:
        DataError: there are no keys and the address is not loopback, or the policy or the log of decisions cannot be
            used.
        StateError: the state cannot be opened.
        TenantError: the folder of deltas cannot be read, or the base's name is a tenant's.
    """
    if not plan.deltas.is_dir():
        raise TenantError(f"there is no folder {plan.deltas}; give the one whose subfolders are the deltas.")
    with ExitStack() as stack:
        state = open_state(plan.state)
        stack.callback(state.close)
        gate = _opened_gate(state, plan.host, stack)
        overlay = attach(base.model)
        stack.callback(overlay.detach)
        admission = _opened_admission(base, plan, stack)
        store = stack.enter_context(
            TenantStore(
                _guarded(overlay, admission),
                plan.deltas,
                byte_budget=plan.delta_bytes,
                loaders=plan.loaders,
                base_root=base.root,
            )
        )
        _register(store, gate, plan)
        tenants = store if admission is None else admission.tenants(store)
        engine = stack.enter_context(
            Engine(base.model, base.tokenizer, overlay=overlay, store=tenants, settings=plan.engine)
        )
        engine.start()
        if admission is not None:
            admission.probe_with(engine, base.tokenizer)
        services = Services(
            engine=engine,
            store=store,
            base=base,
            base_name=plan.base_name,
            gate=gate,
            deltas=plan.deltas,
            admission=admission,
            metrics=ServiceMetrics(engine, store, plan.base_name, None if admission is None else admission.log),
            settings=replace(plan.settings, hosts=_LOCAL_HOSTS) if gate.is_open else plan.settings,
        )
        app = build_app(services, _routers(plan))
        stack.callback(app.state.texts.templates.close)
        yield Assembled(services, app, gate.is_open, state.where)


def _routers(plan: Plan) -> list[APIRouter]:
    metrics = metrics_router("public" if plan.public_metrics else "manage")
    deltas = [delta_routes.router, upload_routes.router, decision_routes.router]
    return [page.router, status.router, admin_keys.router, *deltas, metrics]


def _opened_gate(state: State, host: str, stack: ExitStack) -> StateGate:
    local = is_loopback(host)
    gate = StateGate(state, open_until_first_key=local)
    stack.callback(gate.close)
    if not local and not gate.has_keys:
        raise DataError(
            f"{host} can be reached from other machines, and there is no key yet; make one with `deltakeeper keys "
            f"create --state {state.where} --name admin --admin`, or listen on 127.0.0.1."
        )
    return gate


def _opened_admission(base: LiveBase, plan: Plan, stack: ExitStack) -> PolicyAdmission | None:
    if plan.policy is None:
        return None
    policy = read_policy(plan.policy)
    if (wanted := policy.policy.base_root) not in (None, base.root):
        raise DataError(
            f"{plan.policy} asks for deltas of the base {wanted[:12]}… and {base.root[:12]}… is served, so that it "
            "would admit none; correct base_root, or serve that base."
        )
    admission = PolicyAdmission(policy, base.root, DecisionLog(plan.decisions))
    stack.callback(admission.close)
    return admission


def _guarded(overlay: TenantOverlay, admission: PolicyAdmission | None) -> TenantOverlay:
    return overlay if admission is None else admission.guard(overlay)


def _register(store: TenantStore, gate: StateGate, plan: Plan) -> None:
    """Make tenants known: those of the state as they were registered, then every further subfolder by its name."""
    for record in gate.tenants.all():
        folder = plan.deltas / record.folder
        if folder.is_dir():
            store.register(record.name, folder, planes=record.planes)
        else:
            _log.warning("tenant %s was served from %s, which is gone; it is left out", record.name, folder)
    try:
        store.scan()
    except TenantError as error:
        _log.warning("%s", error)
    if plan.base_name in store.names():
        raise TenantError(f"'{plan.base_name}' names the base and a tenant; give the base another with --name.")
