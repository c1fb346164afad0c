"""Admission by a policy file: files before a load, a canary after it, and every decision in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deltakeeper.artifact import MANIFEST_NAME, DeltaArtifact, open_artifact
from deltakeeper.engine import Engine
from deltakeeper.engine.lease import Lease
from deltakeeper.engine.store import TenantStore
from deltakeeper.engine.tenant_records import TenantOverlay
from deltakeeper.errors import DeltakeeperError, OversizedError, TenantError, is_lasting
from deltakeeper.overlay.loading import version_of
from deltakeeper.service.admission.admitted_tenants import AdmittedTenants, Say, SharedLease
from deltakeeper.service.admission.canary import Canary
from deltakeeper.service.admission.decisions import DecisionLog
from deltakeeper.service.admission.inspection import Finding, inspect, statement_of, stored_planes
from deltakeeper.service.admission.load_guard import LoadGuard, not_admitted
from deltakeeper.service.admission.policy import PolicyFile
from deltakeeper.service.admission.replacing import Record, Replacement
from deltakeeper.service.admission.standing import Key, Standing
from deltakeeper.service.admission.trials import Trials
from deltakeeper.service.admission_port import Decision
from deltakeeper.service.errors import Unavailable
from deltakeeper.service.serving_port import TenantPlaces

_PAUSE = 0.01
_SEEN_SECONDS = 5.0
"""How long `decide` believes that unchanged files say the same; a load looks at them itself in any case."""

Signature = tuple[tuple[int, int, int] | None, ...]
"""Inode, size and time of change of the folder, its manifest and its statement; None for what is not there."""


class PolicyAdmission:
    """Lets deltas in by a policy; implements `admission_port.Admission`.

    It stands in two places, so that nothing has to be asked before a request and nothing gets around it: the store
    loads through `guard`, and the engine gets its tenants through `tenants`.

        admission = PolicyAdmission(read_policy(file), base.root, DecisionLog(log))
        store = TenantStore(admission.guard(overlay), deltas, byte_budget=budget, base_root=base.root)
        engine = Engine(base.model, base.tokenizer, overlay=overlay, store=admission.tenants(store))
        admission.probe_with(engine, base.tokenizer)

    Args:
        file: the policy.
        base_root: fingerprint of the base that is served.
        log: where decisions go.
        now: the clock that statements are held against.
    """

    def __init__(
        self,
        file: PolicyFile,
        base_root: str,
        log: DecisionLog,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.file, self.log = file, log
        self._base_root, self._now = base_root, now
        self._standing = Standing()
        self._seen: dict[str, tuple[tuple[Path, Signature], float, Decision]] = {}
        self._store: TenantStore | None = None
        self._tenants: AdmittedTenants | None = None
        self._trials: Trials | None = None

    def guard(self, overlay: TenantOverlay) -> LoadGuard:
        """What the store is to load through."""
        return LoadGuard(overlay, self, self._standing)

    def tenants(self, store: TenantStore) -> AdmittedTenants:
        """What the engine is to get its tenants from."""
        self._store, self._tenants = store, AdmittedTenants(store, self._ask)
        self._trials = Trials(store, self._tenants, self._standing, self._conclude)
        return self._tenants

    def probe_with(self, engine: Engine, tokenizer: Any) -> None:
        """Run canaries on an engine, with the base's tokenizer; raises DataError for what the policy names wrongly."""
        _, _, trials = self._wired()
        trials.tokenizer = tokenizer
        if self.file.policy.canary is not None:
            trials.canary = Canary(self.file, engine, tokenizer)

    def close(self) -> None:
        """End trials and close the log; after the engine was closed."""
        if self._trials is not None:
            self._trials.close()
        self.log.close()

    # What routes ask

    @property
    def max_bytes(self) -> int | None:
        """See `Admission.max_bytes`."""
        return self.file.policy.max_bytes

    def decide(self, name: str, folder: Path) -> Decision:
        """See `Admission.decide`; the same files are not read again for some seconds, however often somebody asks."""
        seen = (folder, _signature(folder))
        held = self._seen.get(name)
        if held is None or held[0] != seen or time.monotonic() > held[1]:
            held = (seen, time.monotonic() + _SEEN_SECONDS, self._decide(name, folder))
            self._seen[name] = held
        if held[2].verdict == "refused" and stands_for_another(self._store, name, folder):
            self._pass_over(name)
        return held[2]

    def _decide(self, name: str, folder: Path) -> Decision:
        try:
            artifact = open_artifact(folder)
            version = version_of(artifact, None)
            finding = self.look_at(artifact, version)
        except (DeltakeeperError, OSError) as error:
            if not is_lasting(error):
                raise Unavailable(f"'{name}' could not be looked at now: {error}", retry_after=5.0) from error
            return self._logged(Decision(name, "refused", reasons=(str(error),)))
        with self._standing.lock:
            earlier = self._standing.refused.get(version)
        if finding.verdict != "refused" and earlier is not None:
            return self._logged(replace(earlier, name=name))
        cut = finding.planes is not None and finding.planes < stored_planes(artifact)
        planes = finding.planes if cut else None
        decision = Decision(name, finding.verdict, planes, finding.reasons, artifact.manifest_sha256)
        if finding.verdict == "refused":
            return self._logged(decision)
        return decision  # what is let in is decided once it is loaded

    def settle(self, name: str, seconds: float) -> Decision:
        """See `Admission.settle`."""
        store, tenants, _ = self._wired()
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                store.load(name).result(left)
                pin = tenants.acquire(name)
            except TimeoutError:
                break
            except OversizedError:
                raise
            except DeltakeeperError as error:
                known = self.known(name)
                if known is not None and known.verdict == "refused":
                    return known
                if not is_lasting(error):  # no room, or a canary that has to wait
                    raise Unavailable(str(error), retry_after=1.0) from error
                return self._logged(Decision(name, "refused", reasons=(str(error),)))
            if pin is not None:
                pin.release()
                with self._standing.lock:
                    decision = self._standing.decided.get((name, pin.version))
                if decision is not None:
                    return decision
            time.sleep(_PAUSE)
        raise Unavailable(f"Nothing was decided on '{name}' in {seconds:g} seconds; ask again later.", retry_after=5.0)

    def admits(self, name: str) -> bool:
        """See `Admission.admits`."""
        _, tenants, _ = self._wired()
        pin = tenants.acquire(name)
        if pin is not None:
            pin.release()
        return pin is not None

    def replace(self, name: str, folder: Path, *, planes: int | None = None) -> Future[str]:
        """See `Admission.replace`."""
        store, _, trials = self._wired()
        needed = self.file.policy.canary is not None
        record = Record(self._standing, self._logged, self._pass_over)
        return Replacement(store, trials, record, needed, name, folder, planes).begin()

    def known(self, name: str, version: str | None = None) -> Decision | None:
        """See `Admission.known`."""
        with self._standing.lock:
            key = (name, version or self._standing.asked.get(name, ""))
            decided = self._standing.decided.get(key)
            passed_over = self._standing.passed_over.get(name)
        latest = self.log.latest(name)
        return decided or (None if latest == passed_over else latest)

    def history(self, name: str | None = None, *, limit: int = 100, before: int | None = None) -> Sequence[Any]:
        """See `Admission.history`."""
        return self.log.recent(name, limit=limit, before=before)

    # What the guard asks, on loader threads

    def look_at(self, artifact: DeltaArtifact, version: str) -> Finding:
        """What policy says of files, and what an earlier canary left them."""
        finding = inspect(self.file, artifact, self._base_root, self._now())
        with self._standing.lock:
            limit = self._standing.limits.get(version)
        if finding.verdict == "refused" or limit is None:
            return finding
        planes = limit.planes if finding.planes is None else min(limit.planes, finding.planes)
        return Finding("quarantined", planes, (*finding.reasons, *limit.reasons), finding.expires)

    def log_refusal(self, decision: Decision) -> None:
        """Write down that files were refused."""
        with self._standing.lock:
            self._standing.asked.pop(decision.name, None)
        self._logged(decision)

    # What the gate asks, on the engine's thread

    def _ask(self, lease: Lease) -> Say:
        key = (lease.name, lease.version)
        store, _, trials = self._wired()
        standing = self._standing
        with standing.lock:
            standing.asked[lease.name] = lease.version
            load = standing.loads.get(lease.version)
            if load is None:
                raise TenantError(not_admitted(lease.name))  # it came past the guard
            if load.finding.expires is not None and load.finding.expires < self._now():
                standing.decided.pop(key, None)
                store.unload(lease.name)  # the next load looks at the statement anew
                return "wait"
            decision = standing.decided.get(key)
            if decision is not None:
                if decision.verdict == "refused":
                    raise TenantError(not_admitted(lease.name))
                return "yes"
            if key in standing.on_trial or key in standing.giving_way:
                return "wait"
            if (put_off := standing.retries.get(key)) is not None:
                if time.monotonic() < put_off[0]:
                    raise TenantError(f"The model '{lease.name}' is not admitted yet; ask again later.")
                del standing.retries[key]
            standing.on_trial.add(key)
        trials.begin(SharedLease(lease), load, self.file.policy.canary is not None)
        return "taken"

    def _conclude(self, key: Key, decision: Decision) -> None:
        store, _, _ = self._wired()
        self._logged(decision)  # before it counts
        with self._standing.lock:
            self._standing.decided[key] = decision
        if decision.verdict == "refused":
            with suppress(TenantError):  # it was removed meanwhile
                store.unload(decision.name)

    def _logged(self, decision: Decision) -> Decision:
        with self._standing.lock:
            self._standing.passed_over.pop(decision.name, None)
        self.log.write(decision, self.file.sha256)
        return decision

    def _pass_over(self, name: str) -> None:
        latest = self.log.latest(name)
        if latest is not None and latest.verdict == "refused":
            with self._standing.lock:
                self._standing.passed_over[name] = latest

    def _wired(self) -> tuple[TenantStore, AdmittedTenants, Trials]:
        if self._store is None or self._tenants is None or self._trials is None:
            raise TenantError("Admission knows no store yet; call `tenants` before the service starts.")
        return self._store, self._tenants, self._trials


def stands_for_another(store: TenantPlaces | None, name: str, folder: Path) -> bool:
    """Whether a name is known, and for another artifact."""
    try:
        return store is not None and store.source(name).path.resolve() != folder.resolve()
    except TenantError:
        return False


def _signature(folder: Path) -> Signature:
    def seen(path: Path) -> tuple[int, int, int] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    return seen(folder), seen(folder / MANIFEST_NAME), seen(statement_of(folder))
