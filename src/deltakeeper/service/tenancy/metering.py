"""What was used of the quotas, in the memory of the process that serves.

A service that is started again begins with full allowances: what is lost is a minute's worth at most.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from types import TracebackType
from typing import Literal, NamedTuple

from deltakeeper.service.errors import BadRequest, ServiceError, TooManyRequests
from deltakeeper.service.tenancy.buckets import SharedBucket
from deltakeeper.service.tenancy.quotas import EACH, Limits, Scope
from deltakeeper.service.tenancy.slots import Slots

_Name = tuple[Scope, str]
MOST_IDLE_ACCOUNTS = 4096
"""Accounts that are kept before those that nobody uses are let go."""


class Asked(NamedTuple):
    """What a request takes of a quota."""

    requests: int = 0
    tokens: int = 0
    answers: int = 0


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

    def refusal(self, holder: Hashable, asked: Asked, now: float) -> tuple[str, float | None] | None:
        """Which limit keeps a request out, and for how many seconds (None for good); None if none does."""
        limits = self.limits
        if self.tokens is not None and asked.tokens > self.tokens.per_minute:
            return f"{limits.tokens_per_minute} tokens a minute, and the prompt alone has more", None
        if limits.concurrent is not None and asked.answers > limits.concurrent:
            return f"{limits.concurrent} answers at a time, and this request wants {asked.answers}", None
        if self.requests is not None and asked.requests and (wait := self.requests.wait(holder, asked.requests, now)):
            return f"{limits.requests_per_minute} requests a minute", wait
        if self.tokens is not None and asked.tokens and (wait := self.tokens.wait(holder, asked.tokens, now)):
            return f"{limits.tokens_per_minute} tokens a minute", wait
        # last: who is refused here is given a place in a line
        if asked.answers and (wait := self.slots.wait(holder, now, asked.answers)):
            return f"{limits.concurrent} answers at a time", wait
        return None

    def begin(self, holder: Hashable, asked: Asked, now: float) -> None:
        """Take a request in."""
        if self.requests is not None and asked.requests:
            self.requests.take(holder, asked.requests, now)
        self.spend(holder, asked.tokens, now)
        if asked.answers:
            self.slots.take(holder, asked.answers)

    def spend(self, holder: Hashable, tokens: int, now: float) -> None:
        """Charge tokens."""
        if self.tokens is not None and tokens:
            self.tokens.take(holder, tokens, now)

    def is_idle(self, now: float) -> bool:
        """Whether a new account would be the same."""
        buckets = (bucket for bucket in (self.requests, self.tokens) if bucket is not None)
        return not self.slots.running and all(bucket.is_full(now) for bucket in buckets)


class Meter:
    """Lets requests in while quotas last; safe on any thread, and each call takes microseconds.

    A request is counted against its key first (`count`), before anything is made of it. Its tokens and answers then
    have to pass the quota of the key and that of the model together: one that is refused is charged to neither, so a
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

    def count(self, key_id: str) -> None:
        """Count a request against its key.

        Raises:
            TooManyRequests: so many were counted in this minute.
        """
        with self._lock:
            self._take([(("key", key_id), Asked(requests=1))], key_id)

    def check(self, key_id: str | None, model: str, prompt_tokens: int, answers: int) -> None:
        """Raise what `admit` would, and charge nothing.

        Who finds no free slot stands in the line for one, as if `admit` had refused. Who is let through keeps the
        place until `admit` gives the slot, and has to `withdraw` if it comes to no `admit`.
        """
        with self._lock:
            self._refuse(_wanted(key_id, model, prompt_tokens, answers), key_id)

    def withdraw(self, key_id: str | None, model: str) -> None:
        """Give up a place in the line for a model's slots: a request that was let through asks for none."""
        with self._lock:
            account = self._accounts.get(("model", model))
            if account is not None:
                account.slots.leave(key_id)

    def admit(self, key_id: str | None, model: str, prompt_tokens: int, answers: int = 1) -> Ticket:
        """Take a request in, with all of its answers.

        Args:
            key_id: who asks; None without keys, for whom only the model's quota counts.
            model: what is asked.
            prompt_tokens: of all its prompts, charged at once.
            answers: that are made side by side; 0 for a request that no answer is made for.

        Raises:
            TooManyRequests: a quota is used up.
            BadRequest: a quota is too small for it.
        """
        with self._lock:
            accounts = self._take(_wanted(key_id, model, prompt_tokens, answers), key_id)
        return Ticket(self, key_id, accounts, answers)

    def _take(self, wanted: list[tuple[_Name, Asked]], holder: Hashable) -> list[Account]:
        now = self._clock()
        found = self._refuse(wanted, holder)
        for account, asked in found:
            account.begin(holder, asked, now)
        return [account for account, _ in found]

    def _refuse(self, wanted: list[tuple[_Name, Asked]], holder: Hashable) -> list[tuple[Account, Asked]]:
        now = self._clock()
        found = []
        for name, asked in wanted:
            account = self._account(name, now)
            if account is not None:
                found.append((account, asked))
                if (refused := account.refusal(holder, asked, now)) is not None:
                    raise _refusal(*name, *refused)
        return found

    def spend(self, accounts: list[Account], holder: Hashable, tokens: int) -> None:
        """Charge tokens to several accounts."""
        with self._lock:
            now = self._clock()
            for account in accounts:
                account.spend(holder, tokens, now)

    def give_back(self, accounts: list[Account], holder: Hashable, answers: int) -> None:
        """Free the slots of a request."""
        with self._lock:
            now = self._clock()
            for account in accounts:
                if answers:  # or it would hold a share like one that has just answered
                    account.slots.give(holder, now, answers)

    def _limits_of(self, name: _Name) -> Limits | None:
        return self._limits.get(name) or self._limits.get((name[0], EACH))

    def _account(self, name: _Name, now: float) -> Account | None:
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
    """One request that was taken in (`access.Usage`); as a context manager it gives its slots back, once."""

    def __init__(self, meter: Meter, holder: Hashable, accounts: list[Account], answers: int) -> None:
        self._meter, self._holder, self._accounts, self._answers = meter, holder, accounts, answers
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
            self._meter.give_back(self._accounts, self._holder, self._answers)
        return False


def _resized(bucket: SharedBucket | None, per_minute: int | None, now: float) -> SharedBucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return SharedBucket(per_minute, now)
    if bucket.per_minute != per_minute:
        bucket.resize(per_minute, now)
    return bucket


def _wanted(key_id: str | None, model: str, tokens: int, answers: int) -> list[tuple[_Name, Asked]]:
    of_model: tuple[_Name, Asked] = ("model", model), Asked(1, tokens, answers)
    return [of_model] if key_id is None else [(("key", key_id), Asked(0, tokens, answers)), of_model]


def _refusal(scope: Scope, subject: str, limit: str, wait: float | None) -> ServiceError:
    whose = "This key may ask" if scope == "key" else f"Model '{subject}' may be asked"
    told = f"{whose} for {limit}"
    if wait is None:  # told apart from the others, which clients repeat by themselves
        return BadRequest(f"{told}; ask for less.", code="quota_too_small")
    return TooManyRequests(
        f"{told}; ask again in {max(1, math.ceil(wait))} s.", code="rate_limit_exceeded", retry_after=wait
    )
