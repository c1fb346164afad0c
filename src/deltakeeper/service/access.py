"""Who asks, what they may use, and how much of it: what routes need to know of keys and quotas, and nothing else."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

Role = Literal["admin", "tenant", "monitor", "open"]


@dataclass(frozen=True)
class Principal:
    """Whoever holds a key; `open` is everybody on a loopback address where no key was made yet.

    Attributes:
        key_id: public name of the key, for logs; None without keys.
        role: `admin` manages and may ask everyone; `tenant` asks; `monitor` reads metrics and nothing else; `open` may
            do all, on loopback.
        models: names that may be asked, the base's among them if it may be; None for all.
    """

    key_id: str | None
    role: Role
    models: frozenset[str] | None = None

    def may_use(self, model: str) -> bool:
        """Whether a model may be asked: the same answer for what there is not and what is not theirs."""
        return self.models is None or model in self.models

    @property
    def manages(self) -> bool:
        """Whether admin routes are open to them."""
        return self.role in ("admin", "open")

    @property
    def measures(self) -> bool:
        """Whether metrics are open to them."""
        return self.role != "tenant"

    @property
    def asks(self) -> bool:
        """Whether they may ask models at all."""
        return self.role != "monitor"


class Usage(Protocol):
    """One admitted request; its answers count against concurrency until it is closed."""

    def spend(self, tokens: int) -> None:
        """Charge tokens of the answer as they are made."""


class Gate(Protocol):
    """Keys and quotas. All methods are quick and may be called on any thread."""

    @property
    def is_open(self) -> bool:
        """Whether everybody is let in now, since no key was ever made."""

    @property
    def knows(self) -> bool:
        """Whether it can tell keys at all; not while it could not read them for too long."""

    def identify(self, authorization: str | None) -> Principal:
        """The holder of a bearer key; raises `Unauthorized`."""

    def count(self, principal: Principal) -> None:
        """Count a request against its key, before anything is made of it; raises `TooManyRequests`."""

    def check(self, principal: Principal, model: str, answers: int) -> None:
        """Refuse what `admit` would refuse, whatever the prompt; nothing is charged, and it raises the same.

        One that is refused has the place in the line that `admit` would have given. One that passes goes on to `admit`,
        or gives its place up with `withdraw`, so that nothing is kept for a request that nobody will make.
        """

    def withdraw(self, principal: Principal, model: str) -> None:
        """Give up the place of a request that passed `check` and is not admitted."""

    def admit(
        self, principal: Principal, model: str, prompt_tokens: int, answers: int = 1
    ) -> AbstractContextManager[Usage]:
        """Take all answers of a request in under the holder's and the model's quotas, or none of them.

        With no answers it counts as a request of the model alone.

        Raises:
            TooManyRequests: a quota is used up.
            BadRequest: a quota could never let it in.
        """
