"""Admission at the ingress of a cluster: replicas decide where they load, and all decisions are gathered here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from deltakeeper.errors import DeltakeeperError, OversizedError, is_lasting
from deltakeeper.service.admission import DecisionLog
from deltakeeper.service.admission.deciding import stands_for_another
from deltakeeper.service.admission.policy import PolicyFile
from deltakeeper.service.admission_port import Decision
from deltakeeper.service.cluster.failures import error_of
from deltakeeper.service.cluster.messages import Failure, Told
from deltakeeper.service.cluster.watch import Watch
from deltakeeper.service.errors import Refused, Unavailable
from deltakeeper.service.serving_port import TenantPlaces

_DECIDE_SECONDS = 120.0


class Gathered:
    """The decisions of all replicas, written once more into one log; safe on any thread.

    Args:
        log: where they go.
        policy: the policy, which is that of all replicas.
    """

    def __init__(self, log: DecisionLog, policy: PolicyFile) -> None:
        self.log = log
        self.policy = policy
        self._lock = threading.Lock()
        self._seen: dict[str, int] = {}

    def listen(self, told: Told) -> None:
        """Take in what a replica's log has that was not told before.

        Raises:
            Unavailable: it cannot be written down now; the rest counts as not told yet.
        """
        with self._lock:
            seen = self._seen.get(told.replica, 0)
            for number, decision in told.decisions:
                if number > seen:
                    self.log.write(decision, self.policy.sha256)
                    seen = self._seen[told.replica] = number


class ClusterAdmission:
    """Implements `admission_port.Admission` over replicas.

    Args:
        gathered: their decisions.
        watch: the thread that speaks with them.
        tenants: which are loaded by them.
    """

    def __init__(self, gathered: Gathered, watch: Watch, tenants: TenantPlaces) -> None:
        self._gathered, self._watch, self._tenants = gathered, watch, tenants
        self._passed_over: dict[str, tuple[Decision, Decision | None]] = {}

    @property
    def max_bytes(self) -> int | None:
        """See `Admission.max_bytes`."""
        return self._gathered.policy.policy.max_bytes

    def decide(self, name: str, folder: Path) -> Decision:
        """See `Admission.decide`; a replica looks at the files."""
        before = self.known(name)
        try:
            found = self._watch.run(self._watch.replicas.decide(name, folder.absolute())).result(_DECIDE_SECONDS)
        except (TimeoutError, DeltakeeperError) as error:
            raise Unavailable(f"No replica could look at '{name}'; ask again later.", retry_after=5.0) from error
        if found.told is not None:
            self._gathered.listen(found.told)
        if isinstance(found, Failure):
            raise error_of(found)
        if found.decision.verdict == "refused" and stands_for_another(self._tenants, name, folder):
            self._pass_over(name, before)
        return found.decision

    def settle(self, name: str, seconds: float) -> Decision:
        """See `Admission.settle`."""
        try:
            self._tenants.load(name).result(seconds)
        except TimeoutError as error:
            raise Unavailable(f"Nothing was decided on '{name}' in {seconds:g} seconds.", retry_after=5.0) from error
        except OversizedError:
            raise
        except DeltakeeperError as error:
            known = self.known(name)
            if known is not None and known.verdict == "refused":
                return known
            if not is_lasting(error):
                raise Unavailable(str(error), retry_after=1.0) from error
            refused = Decision(name, "refused", reasons=(str(error),))
            self._gathered.log.write(refused, self._gathered.policy.sha256)
            return refused
        known = self.known(name)
        if known is None:
            raise Unavailable(f"Nothing was decided on '{name}'; ask again later.", retry_after=1.0)
        return known

    def admits(self, name: str) -> bool:
        """See `Admission.admits`; a replica says that it has loaded a version when its canary has passed."""
        return True

    def replace(self, name: str, folder: Path, *, planes: int | None = None) -> Future[str]:
        """See `Admission.replace`; the replica that the name's requests go to does it, the others when they come."""
        before = self.known(name)

        def note(done: Future[str]) -> None:
            error = None if done.cancelled() else done.exception()
            if isinstance(error, Refused) or is_lasting(error):
                self._pass_over(name, before)

        future = self._tenants.replace(name, folder, planes=planes)
        future.add_done_callback(note)
        return future

    def _pass_over(self, name: str, before: Decision | None) -> None:
        """Note that the latest decision is not on what a name stands for."""
        latest = self._gathered.log.latest(name)
        if latest is not None and latest.verdict == "refused":
            self._passed_over[name] = (latest, before)

    def known(self, name: str, version: str | None = None) -> Decision | None:
        """The latest decision on a tenant, whichever replica made it, unless it kept out what was to replace it."""
        latest = self._gathered.log.latest(name)
        refusal, before = self._passed_over.get(name, (None, None))
        return before if latest is not None and latest == refusal else latest

    def history(self, name: str | None = None, *, limit: int = 100, before: int | None = None) -> Sequence[Any]:
        """See `Admission.history`."""
        return self._gathered.log.recent(name, limit=limit, before=before)
