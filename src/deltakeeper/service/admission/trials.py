"""Trials: a version that was just loaded answers the probe set, and is then admitted, dimmed or refused."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, cast

from deltakeeper.engine.store import TenantStore
from deltakeeper.errors import ChangedError, DeltakeeperError, SideFileError, TenantError
from deltakeeper.overlay import TenantDelta
from deltakeeper.prompting import tokenizers
from deltakeeper.service.admission.admitted_tenants import AdmittedTenants, SharedLease
from deltakeeper.service.admission.canary import Canary, CanaryError
from deltakeeper.service.admission.standing import Key, Limit, Load, Standing
from deltakeeper.service.admission_port import Decision

_log = logging.getLogger("deltakeeper.service")

RETRY_SECONDS = 5.0
"""How long a version whose canary could not be run is left alone."""
_AT_ONCE = 2
"""Trials side by side: each asks all its prompts at once, and the engine has others to serve."""


class Trials:
    """Runs canaries on threads of its own and acts on what they say."""

    def __init__(
        self,
        store: TenantStore,
        tenants: AdmittedTenants,
        standing: Standing,
        conclude: Callable[[Key, Decision], None],
    ) -> None:
        """Make it ready; `canary` is None until there is one.

        Args:
            store: where a version that fails is unloaded.
            tenants: the gate, which lets the canary alone through.
            standing: what is remembered.
            conclude: told of a final decision.
        """
        self.canary: Canary | None = None
        self.tokenizer: Any = None
        self._store, self._tenants, self._standing, self._conclude = store, tenants, standing, conclude
        self._threads = ThreadPoolExecutor(_AT_ONCE, "deltakeeper-canary")

    def begin(self, shared: SharedLease, load: Load, needed: bool) -> None:
        """Try a version, and let go of the lease at the end.

        Args:
            shared: a hold on it, which is taken over.
            load: what its files said.
            needed: whether policy asks for a canary.
        """
        self._threads.submit(self._run, shared, load, needed)

    def begin_beside(
        self, shared: SharedLease, load: Load, needed: bool, conclude: Callable[[Decision | Limit | Exception], None]
    ) -> None:
        """Try a version whose name stands for another, and let go of the lease at the end.

        Args:
            shared: a hold on it, which is taken over.
            load: what its files said.
            needed: whether policy asks for a canary.
            conclude: told what came of it, on one of the threads here or when they end, while it is still held.
        """

        def run() -> None:
            try:
                try:
                    outcome: Decision | Limit | Exception = self._judge(shared, load, needed)
                except Exception as error:
                    outcome = error
                conclude(outcome)
            finally:
                shared.let_go()

        def end(done: Future[None]) -> None:
            if done.cancelled():
                conclude(CanaryError("the service is about to stop."))
                shared.let_go()

        try:
            self._threads.submit(run).add_done_callback(end)
        except RuntimeError as error:  # the threads have ended
            conclude(CanaryError(f"{error}."))
            shared.let_go()

    def close(self) -> None:
        """Begin nothing more, and wait for those that run; the engine should be closed by then, which ends them."""
        self._threads.shutdown(cancel_futures=True)
        if self.canary is not None:
            self.canary.close()

    def _run(self, shared: SharedLease, load: Load, needed: bool) -> None:
        lease = shared.lease
        key = (lease.name, lease.version)
        try:
            outcome = self._judge(shared, load, needed)
            if isinstance(outcome, Limit):
                self._dim(key, load, outcome)
            else:
                self._conclude(key, outcome)
        except ChangedError as error:
            _log.warning("%s is loaded anew: %s", lease.name, error)
            with suppress(TenantError):  # it was removed meanwhile
                self._store.unload(lease.name)
        except (CanaryError, TenantError) as error:  # it may pass
            self._put_off(key, str(error))
        except Exception as error:
            _log.exception("the canary of %s failed", lease.name)
            self._put_off(key, f"the canary failed: {type(error).__name__}")
        finally:
            with self._standing.lock:
                self._standing.on_trial.discard(key)
            shared.let_go()

    def _judge(self, shared: SharedLease, load: Load, needed: bool) -> Decision | Limit:
        """The decision on a version, or the limit at which it is to be loaded again."""
        return self._try(shared, load) if needed else self._decision(shared.lease.name, load)

    def _try(self, shared: SharedLease, load: Load) -> Decision | Limit:
        lease, canary = shared.lease, self.canary
        if canary is None:
            raise CanaryError("policy asks for a canary and no engine runs one yet.")
        alias = self._tenants.open_canary(shared)
        try:
            words = tokenizers(self.tokenizer, {lease.name: cast(TenantDelta, lease.delta)})[lease.name]
            reading = canary.measure(alias, words)
            faults = tuple(canary.faults(reading))
        except SideFileError as error:
            return self._refuse(lease.name, lease.version, load, (str(error),))
        finally:
            self._tenants.close_canary(alias)
        numbers = canary.numbers(reading)
        if not faults:
            return self._decision(lease.name, load, numbers)
        rules = canary.rules
        if rules.failing == "quarantine" and load.dimmable and load.served > rules.planes:
            return Limit(rules.planes, faults)
        return self._refuse(lease.name, lease.version, load, faults, numbers)

    def _decision(self, name: str, load: Load, canary: dict[str, float] | None = None) -> Decision:
        verdict, planes, reasons = load.finding.verdict, load.finding.planes, load.finding.reasons
        return Decision(name, verdict, planes, reasons, load.manifest_sha256, canary)

    def _refuse(
        self, name: str, version: str, load: Load, reasons: tuple[str, ...], canary: dict[str, float] | None = None
    ) -> Decision:
        reasons = (*load.finding.reasons, *reasons)
        decision = Decision(name, "refused", None, reasons, load.manifest_sha256, canary)
        with self._standing.lock:
            self._standing.refused[version] = decision
        return decision

    def _dim(self, key: Key, load: Load, limit: Limit) -> None:
        """Load a version again at fewer planes, where it is tried again; this one serves nobody meanwhile."""
        name, version = key
        with self._standing.lock:
            self._standing.limits[load.whole] = limit
            self._standing.giving_way.add(key)

        def loaded(future: Future[str]) -> None:
            with self._standing.lock:
                self._standing.giving_way.discard(key)
            if (error := future.exception()) is not None:
                reasons = (*limit.reasons, f"It could not be loaded at {limit.planes} sign planes: {error}")
                self._conclude(key, self._refuse(name, version, load, reasons))

        try:
            self._store.replace(name, load.path, planes=load.asked).add_done_callback(loaded)
        except DeltakeeperError:  # it was removed, so nobody waits for it
            with self._standing.lock:
                self._standing.giving_way.discard(key)

    def _put_off(self, key: Key, why: str) -> None:
        _log.warning("%s waits for its canary: %s", key[0], why)
        with self._standing.lock:
            self._standing.retries[key] = (time.monotonic() + RETRY_SECONDS, why)
