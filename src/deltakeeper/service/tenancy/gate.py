"""The gate: who holds a key, and whether quotas let a request in (`access.Gate`), from a state in a database.

Requests never wait for the database. The gate works on a copy in memory; a thread looks four times a second whether
another process has changed the state. If the state cannot be read for a minute, nobody is let in, since a key might
have been revoked meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deltakeeper.service.access import Principal
from deltakeeper.service.errors import Unauthorized, Unavailable
from deltakeeper.service.tenancy.database import State, StateError
from deltakeeper.service.tenancy.keys import PREFIX, Key, KeyRing, find_key, index_keys
from deltakeeper.service.tenancy.metering import Meter, Ticket
from deltakeeper.service.tenancy.quotas import QuotaBook, limits_by_subject
from deltakeeper.service.tenancy.tenants import TenantRegister

_log = logging.getLogger("deltakeeper.service")
LOOK_SECONDS = 0.25
STALE_SECONDS = 60.0
_LONGEST = 256  # characters of a header that may be a key; no more than that is hashed


@dataclass(frozen=True)
class _Copy:
    """The keys at one revision of the state."""

    revision: int
    index: Mapping[bytes, Key]


class StateGate:
    """Keys and quotas of a state; safe on any thread. `close` ends its thread, and leaves the state open.

    Args:
        state: an open one.
        open_until_first_key: let everybody in, as `open`, as long as no key was ever made; for loopback addresses only.
        clock: monotonic seconds.
        now: seconds since 1970.

    Attributes:
        keys: to make and revoke keys.
        quotas: to set quotas.
        tenants: what the state knows of tenants and versions.

    Raises:
        StateError: the state cannot be read.
    """

    def __init__(
        self,
        state: State,
        *,
        open_until_first_key: bool = False,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.keys = KeyRing(state, now)
        self.quotas = QuotaBook(state)
        self.tenants = TenantRegister(state, now)
        self._state = state
        self._clock, self._now = clock, now
        self._opens = open_until_first_key
        self._meter = Meter(clock)
        self._reading = threading.Lock()
        self._copy = _Copy(-1, {})
        self._read_at = clock()
        self._stopped = threading.Event()
        self.refresh()
        self._thread = threading.Thread(target=self._watch, name="deltakeeper-gate", daemon=True)
        self._thread.start()

    @property
    def has_keys(self) -> bool:
        """Whether a key was ever made, a revoked one too."""
        return bool(self._copy.index)

    @property
    def is_open(self) -> bool:
        """Whether everybody is let in now."""
        return self._opens and not self.has_keys

    @property
    def knows(self) -> bool:
        """Whether the state was readable within the last minute."""
        return self._clock() - self._read_at <= STALE_SECONDS

    def identify(self, authorization: str | None) -> Principal:
        """The holder of a bearer key.

        Args:
            authorization: the header, `Bearer dk-…`; None if there is none.

        Raises:
            Unauthorized: there is no key in it, or one that is unknown, expired or revoked.
            Unavailable: the state has not been readable for a minute.
        """
        if not self.knows:
            raise Unavailable("Keys cannot be checked at the moment; ask again later.", retry_after=5)
        if self.is_open:
            return Principal(None, "open")
        key = find_key(self._copy.index, _secret(authorization))
        if key is None:
            raise Unauthorized("This API key is not known; give one that was made for this service.", code=_INVALID)
        state = key.state(self._now())
        if state != "active":
            raise Unauthorized(f"This API key is {state}; ask for a new one.", code=_INVALID)
        return Principal(key.id, key.role, key.models)

    def count(self, principal: Principal) -> None:
        """Count a request against its key; raises `TooManyRequests`."""
        if principal.key_id is not None:
            self._meter.count(principal.key_id)

    def check(self, principal: Principal, model: str, answers: int) -> None:
        """Refuse what `admit` would refuse, whatever the prompt; raises as it does."""
        self._meter.check(principal.key_id, model, min(1, answers), answers)  # tokens are for answers

    def withdraw(self, principal: Principal, model: str) -> None:
        """Give up the place of a request that passed `check` and is not admitted."""
        self._meter.withdraw(principal.key_id, model)

    def admit(self, principal: Principal, model: str, prompt_tokens: int, answers: int = 1) -> Ticket:
        """Take a request in under the quotas of its key and of its model; raises `TooManyRequests`, `BadRequest`."""
        return self._meter.admit(principal.key_id, model, prompt_tokens, answers)

    def refresh(self) -> None:
        """Read the state anew if it has changed, so that what was just written holds at once; raises `StateError`."""
        with self._reading:
            asked = self._clock()
            revision = self._state.revision()  # before the rest: what changes in between is read again next time
            if revision != self._copy.revision:
                index, limits = index_keys(self.keys.all()), limits_by_subject(self.quotas.all())
                if not index and self._copy.index:
                    raise StateError(f"The state {self._state.where} has lost its keys; restore it.")
                self._meter.set_limits(limits)
                self._copy = _Copy(revision, index)
            self._read_at = asked

    def close(self) -> None:
        """End the thread that watches the state."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        lost = False
        while not self._stopped.wait(LOOK_SECONDS):
            try:
                self.refresh()
            except StateError as error:
                if not lost:
                    _log.error(
                        "keys and quotas cannot be read; after %.0f s nobody is let in: %s", STALE_SECONDS, error
                    )
                lost = True
            else:
                if lost:
                    _log.warning("keys and quotas can be read again")
                lost = False


_INVALID = "invalid_api_key"


def _secret(authorization: str | None) -> str:
    scheme, _, secret = (authorization or "").partition(" ")
    secret = secret.strip()
    if scheme.lower() != "bearer" or not secret.startswith(PREFIX) or len(secret) > _LONGEST:
        raise Unauthorized("An API key is needed; send it as `Authorization: Bearer dk-…`.", code=_INVALID)
    return secret
