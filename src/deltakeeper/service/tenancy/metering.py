"""What was used of the quotas, in the memory of the process that serves.

A service that is started again begins with full allowances: what is lost is a minute's worth at most.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from types import TracebackType
from typing import Literal

from deltakeeper.service.errors import TooManyRequests
from deltakeeper.service.tenancy.buckets import SharedBucket
from deltakeeper.service.tenancy.quotas import EACH, Limits, Scope
from deltakeeper.service.tenancy.slots import Slots

MOST_IDLE_ACCOUNTS = 4096
"""Accounts that are kept before those that nobody uses are let go."""


class Account:
    """What was used of one quota, by holder; one thread at a time."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.requests: SharedBucket | None = None
        self.tokens: SharedBucket | None = None
        self.slots = Slots(None)
        self.adjust(limits, now)

    def adjust(self, limits: Limits, now: float) -> None:
        """Change the limits; what is running or owed stays."""
        self.limits = limits
        self.requests = _resized(self.requests, limits.requests_per_minute, now)
        self.tokens = _resized(self.tokens, limits.tokens_per_minute, now)
        self.slots.limit = limits.concurrent

    def refusal(self, holder: Hashable, prompt_tokens: int, now: float) -> tuple[str, float | None] | None:
        """Which limit keeps a request out, and for how many seconds (None for good); None if none does."""
        if self.requests is not None and (wait := self.requests.wait(holder, 1, now)):
            return f"{self.limits.requests_per_minute} requests a minute", wait
        if self.tokens is not None:
            if prompt_tokens > self.tokens.per_minute:
                return f"{self.limits.tokens_per_minute} tokens a minute, and the prompt alone has more", None
            if wait := self.tokens.wait(holder, prompt_tokens, now):
                return f"{self.limits.tokens_per_minute} tokens a minute", wait
        if wait := self.slots.wait(holder, now):  # last: who is refused here is given a place in a line
            return f"{self.limits.concurrent} requests at a time", wait
        return None

    def begin(self, holder: Hashable, prompt_tokens: int, now: float) -> None:
        """Take a request in."""
        if self.requests is not None:
            self.requests.take(holder, 1, now)
        self.spend(holder, prompt_tokens, now)
        self.slots.take(holder)

    def spend(self, holder: Hashable, tokens: int, now: float) -> None:
        """Charge tokens."""
        if self.tokens is not None:
            self.tokens.take(holder, tokens, now)

    def is_idle(self, now: float) -> bool:
        """Whether a new account would be the same."""
        buckets = (bucket for bucket in (self.requests, self.tokens) if bucket is not None)
        return not self.slots.running and all(bucket.is_full(now) for bucket in buckets)


class Meter:
    """Lets requests in while quotas last; safe on any thread, and each call takes microseconds.

    A request has to pass the quota of its key and that of its model. One that is refused is charged to neither, so a
    key that floods uses up its own quota and never the model's. Keys share a model's quota fairly (`buckets`, `slots`).

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._limits: Mapping[tuple[Scope, str], Limits] = {}
        self._accounts: dict[tuple[Scope, str], Account] = {}
        self._prune_at = MOST_IDLE_ACCOUNTS

    def set_limits(self, limits: Mapping[tuple[Scope, str], Limits]) -> None:
        """Turn over to other quotas, by scope and subject."""
        with self._lock:
            now = self._clock()
            self._limits = dict(limits)
            for name, account in list(self._accounts.items()):
                wanted = self._limits_of(name)
                if wanted is None:
                    del self._accounts[name]
                elif wanted != account.limits:
                    account.adjust(wanted, now)

    def admit(self, key_id: str | None, model: str, prompt_tokens: int) -> Ticket:
        """Take a request in.

        Args:
            key_id: who asks; None without keys, for whom only the model's quota counts.
            model: what is asked.
            prompt_tokens: charged at once.

        Raises:
            TooManyRequests: a quota is used up; `retry_after` is None for a prompt that no waiting lets in.
        """
        names: list[tuple[Scope, str]] = [("model", model)] if key_id is None else [("key", key_id), ("model", model)]
        with self._lock:
            now = self._clock()
            accounts = [(name, account) for name in names if (account := self._account(name, now)) is not None]
            for name, account in accounts:
                refused = account.refusal(key_id, prompt_tokens, now)
                if refused is not None:
                    raise _too_many(*name, *refused)
            for _, account in accounts:
                account.begin(key_id, prompt_tokens, now)
        return Ticket(self, key_id, [account for _, account in accounts])

    def spend(self, accounts: list[Account], holder: Hashable, tokens: int) -> None:
        """Charge tokens to several accounts."""
        with self._lock:
            now = self._clock()
            for account in accounts:
                account.spend(holder, tokens, now)

    def give_back(self, accounts: list[Account], holder: Hashable) -> None:
        """Free the slots of a request."""
        with self._lock:
            now = self._clock()
            for account in accounts:
                account.slots.give(holder, now)

    def _limits_of(self, name: tuple[Scope, str]) -> Limits | None:
        return self._limits.get(name) or self._limits.get((name[0], EACH))

    def _account(self, name: tuple[Scope, str], now: float) -> Account | None:
        account = self._accounts.get(name)
        limits = self._limits_of(name) if account is None else None
        if limits is None:
            return account
        if len(self._accounts) >= self._prune_at:
            self._accounts = {n: a for n, a in self._accounts.items() if not a.is_idle(now)}
            self._prune_at = max(MOST_IDLE_ACCOUNTS, 2 * len(self._accounts))
        account = self._accounts[name] = Account(limits, now)
        return account


class Ticket:
    """One request that was taken in (`access.Usage`); as a context manager it gives its slot back, once."""

    def __init__(self, meter: Meter, holder: Hashable, accounts: list[Account]) -> None:
        self._meter, self._holder, self._accounts = meter, holder, accounts
        self._open = True

    def spend(self, tokens: int) -> None:
        """Charge tokens of the answer."""
        if tokens > 0 and self._accounts:
            self._meter.spend(self._accounts, self._holder, tokens)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if self._open:
            self._open = False
            self._meter.give_back(self._accounts, self._holder)
        return False


def _resized(bucket: SharedBucket | None, per_minute: int | None, now: float) -> SharedBucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return SharedBucket(per_minute, now)
    if bucket.per_minute != per_minute:
        bucket.resize(per_minute, now)
    return bucket


def _too_many(scope: Scope, subject: str, limit: str, wait: float | None) -> TooManyRequests:
    then = "shorten the prompt" if wait is None else f"ask again in {max(1, math.ceil(wait))} s"
    whose = "This key may ask" if scope == "key" else f"Model '{subject}' may be asked"
    return TooManyRequests(
        f"{whose} for {limit}; {then}.",
        code="rate_limit_exceeded",
        retry_after=wait,
    )
