"""A version that is to take the place of another is tried beside it; the name is turned over once it has passed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from deltakeeper.engine.lease import Lease
from deltakeeper.engine.store import TenantStore
from deltakeeper.errors import DeltakeeperError, TenantError, is_lasting
from deltakeeper.service.admission.admitted_tenants import SharedLease
from deltakeeper.service.admission.canary import CanaryError
from deltakeeper.service.admission.load_guard import not_admitted
from deltakeeper.service.admission.standing import Limit, Standing
from deltakeeper.service.admission.trials import RETRY_SECONDS, Trials
from deltakeeper.service.admission_port import Decision
from deltakeeper.service.errors import Refused, Unavailable

_log = logging.getLogger("deltakeeper.service")


@dataclass(frozen=True)
class Record:
    """What admission keeps of decisions.

    Attributes:
        standing: its memory.
        log: writes a decision down.
        pass_over: notes that the latest decision, a refusal, is not on what its name stands for.
    """

    standing: Standing
    log: Callable[[Decision], Decision]
    pass_over: Callable[[str], None]


@dataclass(frozen=True)
class Replacement:
    """One replacement, from its load to the turn of its name.

    Attributes:
        store: where both versions are.
        trials: what tries the new one.
        record: where decisions go.
        needed: whether policy asks for a canary.
        name: of the tenant.
        folder: of the new artifact.
        planes: sign planes that are asked for; None for all.
    """

    store: TenantStore
    trials: Trials
    record: Record
    needed: bool
    name: str
    folder: Path
    planes: int | None

    def begin(self) -> Future[str]:
        """Load it and see it through; see `Admission.replace` for the future.

        Raises:
            TenantError: the store does not know the name.
        """
        found: Future[str] = Future()
        self._load(found)
        return found

    @property
    def _standing(self) -> Standing:
        return self.record.standing

    def _load(self, found: Future[str]) -> None:
        with self._standing.lock:
            asked = self._standing.asked.get(self.name)

        def loaded(done: Future[Lease]) -> None:
            error = done.exception()
            if error is None:
                self._try(done.result(), found)
                return
            if isinstance(error, Refused) or is_lasting(error):  # what was kept out is not what the name stands for
                self.record.pass_over(self.name)
                with self._standing.lock:
                    if asked is not None:
                        self._standing.asked.setdefault(self.name, asked)
            _fail(found, error)

        self.store.stage(self.name, self.folder, planes=self.planes).add_done_callback(loaded)

    def _try(self, lease: Lease, found: Future[str]) -> None:
        """Begin the trial of what was loaded; on a thread that may not wait."""
        shared = SharedLease(lease)
        with self._standing.lock:
            load = self._standing.loads.get(lease.version)
            decided = self._standing.decided.get((self.name, lease.version))
        if load is None:  # it came past the guard
            self._give_up(lease, found, Refused(not_admitted(self.name), code="not_admitted"))
            shared.let_go()
            return
        passed = None if decided is None or decided.verdict == "refused" else decided
        whole = load.whole

        def conclude(outcome: Decision | Limit | Exception) -> None:
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                if isinstance(outcome, Limit):
                    self._load_again(lease, whole, outcome, found)
                elif outcome.verdict == "refused":
                    self._refuse(outcome)
                else:
                    self._turn_over(lease, passed or outcome, found)
            except Exception as error:
                self._give_up(lease, found, error)

        self.trials.begin_beside(shared, load, self.needed and passed is None, conclude)

    def _refuse(self, decision: Decision) -> NoReturn:
        self.record.log(decision)
        self.record.pass_over(self.name)
        raise Refused(" ".join(decision.reasons), code="not_admitted")

    def _load_again(self, lease: Lease, whole: str, limit: Limit, found: Future[str]) -> None:
        with self._standing.lock:
            self._standing.limits[whole] = limit
        self.store.discard(lease)
        self._load(found)

    def _turn_over(self, lease: Lease, decision: Decision, found: Future[str]) -> None:
        if not found.set_running_or_notify_cancel():
            self.store.discard(lease)
            return
        try:
            self.record.log(decision)  # before it counts
            with self._standing.lock:
                self._standing.decided[self.name, lease.version] = decision
                self._standing.asked[self.name] = lease.version
            self.store.turn_over(lease)
        except Exception as error:
            self.store.discard(lease)
            found.set_exception(error)
        else:
            found.set_result(lease.version)

    def _give_up(self, lease: Lease, found: Future[str], error: Exception) -> None:
        self.store.discard(lease)
        if isinstance(error, CanaryError):
            error = Unavailable(f"The {str(error).removeprefix('the ')}", retry_after=RETRY_SECONDS)
        _fail(found, error)


def _fail(found: Future[str], error: BaseException) -> None:
    if not isinstance(error, DeltakeeperError):
        _log.error("a replacement failed", exc_info=error)
        error = TenantError(f"The replacement failed ({type(error).__name__}); the log of the service says where.")
    if found.set_running_or_notify_cancel():
        found.set_exception(error)
