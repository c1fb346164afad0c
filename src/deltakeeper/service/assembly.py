"""A whole service from a base, a folder of deltas, a state and a policy: made in order, and taken apart in reverse."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from fastapi import APIRouter, FastAPI

from deltakeeper.artifact import hash_manifest
from deltakeeper.engine import EngineSettings
from deltakeeper.errors import DataError, TenantError
from deltakeeper.live_base import LiveBase
from deltakeeper.loopback import is_loopback
from deltakeeper.service import status
from deltakeeper.service.admission import decisions as decision_routes
from deltakeeper.service.admission import deltas as delta_routes
from deltakeeper.service.admission import read_policy
from deltakeeper.service.admission.placing import finish_links
from deltakeeper.service.admission.policy import PolicyFile
from deltakeeper.service.app import build_app
from deltakeeper.service.engine_room import opened_room
from deltakeeper.service.metrics import ServiceMetrics, metrics_router
from deltakeeper.service.running import Services, Tracer
from deltakeeper.service.serving_port import TenantPlaces
from deltakeeper.service.settings import ServiceSettings
from deltakeeper.service.tenancy import admin_keys
from deltakeeper.service.tenancy.database import open_state
from deltakeeper.service.tenancy.gate import StateGate
from deltakeeper.service.uploads import routes as upload_routes
from deltakeeper.service.web import page

_log = logging.getLogger("deltakeeper.service")


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
        traces: address of a collector that traces are sent to by OTLP over HTTP; None sends none.
        public_metrics: whether `/metrics`, which names tenants, is open to all instead of to monitors and admins.
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
    traces: str | None = None
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
    with ExitStack() as stack:
        gate, where = opened_gate(plan, stack)
        room = stack.enter_context(
            opened_room(
                base,
                plan.deltas,
                delta_bytes=plan.delta_bytes,
                loaders=plan.loaders,
                engine=plan.engine,
                policy=opened_policy(plan, base.root),
                decisions=plan.decisions,
                with_defaults=plan.settings.with_defaults,
            )
        )
        register_tenants(room.store, gate, plan)
        admission = room.admission
        services = Services(
            engine=room.engine,
            store=room.store,
            base=base,
            base_name=plan.base_name,
            gate=gate,
            deltas=plan.deltas,
            admission=admission,
            metrics=ServiceMetrics(
                room.engine, room.store, plan.base_name, None if admission is None else admission.log
            ),
            traces=opened_traces(plan, stack),
            settings=plan.settings,
        )
        app = build_app(services, service_routers(plan))
        stack.callback(app.state.texts.templates.close)
        yield Assembled(services, app, gate.is_open, where)


def service_routers(plan: Plan) -> list[APIRouter]:
    """The routers beyond those that every application has."""
    metrics = metrics_router("public" if plan.public_metrics else "measure")
    deltas = [delta_routes.router, upload_routes.router, decision_routes.router]
    return [page.router, status.router, admin_keys.router, *deltas, metrics]


def opened_gate(plan: Plan, stack: ExitStack) -> tuple[StateGate, str]:
    """Keys and quotas of a plan, closed with the stack, and where their state is, without a password.

    Raises:
        DataError: there are no keys and the address is not loopback.
        StateError: the state cannot be opened.
        TenantError: there is no folder of deltas, in which the state is by default.
    """
    if not plan.deltas.is_dir():
        raise TenantError(f"there is no folder {plan.deltas}; give the one whose subfolders are the deltas.")
    state = open_state(plan.state)
    stack.callback(state.close)
    local = is_loopback(plan.host)
    gate = StateGate(state, open_until_first_key=local)
    stack.callback(gate.close)
    if not local and not gate.has_keys:
        raise DataError(
            f"{plan.host} can be reached from other machines, and there is no key yet; make one with `deltakeeper keys "
            f"create --state {state.where} --name admin --admin`, or listen on 127.0.0.1."
        )
    return gate, state.where


def opened_policy(plan: Plan, base_root: str) -> PolicyFile | None:
    """The policy of a plan; None where whatever fits the base gets in.

    Raises:
        DataError: it cannot be read, or is for another base.
    """
    if plan.policy is None:
        return None
    policy = read_policy(plan.policy)
    if (wanted := policy.policy.base_root) not in (None, base_root):
        raise DataError(
            f"{plan.policy} asks for deltas of the base {wanted[:12]}… and {base_root[:12]}… is served, so that it "
            "would admit none; correct base_root, or serve that base."
        )
    return policy


def opened_traces(plan: Plan, stack: ExitStack) -> Tracer | None:
    """What traces requests, closed with the stack; None where no collector is named.

    Raises:
        DataError: OpenTelemetry is not installed.
    """
    if plan.traces is None:
        return None
    try:
        from deltakeeper.service.traces import open_traces
    except ImportError as error:
        raise DataError(f"traces need {error.name}, which is not installed; install deltakeeper[trace].") from error
    traces = open_traces(plan.traces, metadata.version("deltakeeper"))
    stack.callback(traces.close)
    return traces


def register_tenants(store: TenantPlaces, gate: StateGate, plan: Plan) -> None:
    """Make tenants known: those of the state as they were registered, then every further subfolder by its name.

    A change that a killed process left half done is finished first.

    Raises:
        TenantError: the base's name is a tenant's.
    """
    for name in finish_links(plan.deltas):
        _log.warning("the change of %s was cut off; it was finished now", name)
    for record in gate.tenants.all():
        folder = plan.deltas / record.folder
        if folder.is_dir():
            try:
                store.register(record.name, folder, planes=record.planes)
            except TenantError as error:  # an earlier version let it have this name
                _log.warning("tenant %s is left out: %s", record.name, error)
                continue
            if record.manifest_sha256 not in (None, hash_manifest(folder)):
                _log.warning(
                    "tenant %s was registered with another artifact than the one that is in %s now; that one is served "
                    "if it may be",
                    record.name,
                    folder,
                )
        else:
            _log.warning("tenant %s was served from %s, which is gone; it is left out", record.name, folder)
    try:
        store.scan()
    except TenantError as error:
        _log.warning("%s", error)
    if plan.base_name in store.names():
        raise TenantError(f"'{plan.base_name}' names the base and a tenant; give the base another with --name.")
