"""Quotas as they are set: how much a key may ask, and how much may be asked of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from sqlalchemy import ColumnElement, delete, insert, select

from deltakeeper.service.errors import BadRequest, NotFound
from deltakeeper.service.tenancy.database import State
from deltakeeper.service.tenancy.tables import QUOTAS

Scope = Literal["key", "model"]
EACH = "*"
"""The subject of a quota that holds for each key, or each model, that has none of its own."""
MOST = 10**12


@dataclass(frozen=True)
class Limits:
    """Three limits; None for none.

    Attributes:
        requests_per_minute: a minute's worth may be saved up. A key's requests count as they come, whatever becomes of
            them; a model's when they are let in.
        tokens_per_minute: of prompts and answers; an answer that runs over is owed.
        concurrent: answers at a time; a request has `n` for each of its prompts.

    Raises:
        BadRequest: one is out of range, or there is none.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if not given:
            raise BadRequest("A quota limits requests, tokens or answers at a time; give one of them.")
        for name, value in given.items():
            if not 1 <= value <= MOST:
                raise BadRequest(f"{name} is {value}; give a number from 1 to {MOST:,}, or none.", param=name)


@dataclass(frozen=True)
class Quota:
    """Limits of a key (`subject` is its id) or of a model (its name), or of each (`*`)."""

    scope: Scope
    subject: str
    limits: Limits

    def to_json(self) -> dict[str, object]:
        """What the API shows."""
        return {"scope": self.scope, "subject": self.subject, **asdict(self.limits)}


class QuotaBook:
    """The quotas in a state."""

    def __init__(self, state: State) -> None:
        self._state = state

    def set(self, quota: Quota) -> None:
        """Write a quota in the place of the one there is for its subject.

        Raises:
            BadRequest: the subject is empty or too long.
            StateError: the state cannot be written.
        """
        if not _is_name(quota.subject):
            raise BadRequest("A quota is of a key's id, a model's name, or * for each; give one.", param="subject")
        with self._state.writing() as connection:
            connection.execute(delete(QUOTAS).where(_is(quota.scope, quota.subject)))
            connection.execute(insert(QUOTAS).values(scope=quota.scope, subject=quota.subject, **asdict(quota.limits)))

    def remove(self, scope: Scope, subject: str) -> None:
        """Take a quota away; raises `NotFound` if there is none."""
        if not _is_name(subject):
            raise _missing(scope, subject)
        with self._state.writing() as connection:
            if not connection.execute(delete(QUOTAS).where(_is(scope, subject))).rowcount:
                raise _missing(scope, subject)

    def get(self, scope: Scope, subject: str) -> Quota:
        """A quota; raises `NotFound` if there is none."""
        for quota in self.all():
            if (quota.scope, quota.subject) == (scope, subject):
                return quota
        raise _missing(scope, subject)

    def all(self) -> list[Quota]:
        """All quotas, by scope and subject."""
        with self._state.reading() as connection:
            rows = connection.execute(select(QUOTAS).order_by(QUOTAS.c.scope, QUOTAS.c.subject)).mappings()
            return [Quota(r["scope"], r["subject"], Limits(**{n: r[n] for n in _LIMITS})) for r in rows]


def limits_by_subject(quotas: list[Quota]) -> Mapping[tuple[Scope, str], Limits]:
    """Quotas as a meter wants them."""
    return {(quota.scope, quota.subject): quota.limits for quota in quotas}


_LIMITS = tuple(Limits.__dataclass_fields__)


def _is_name(subject: str) -> bool:
    return 1 <= len(subject) <= 256 and subject.isprintable()  # a database takes neither zero bytes nor surrogates


def _is(scope: Scope, subject: str) -> ColumnElement[bool]:
    return (QUOTAS.c.scope == scope) & (QUOTAS.c.subject == subject)


def _missing(scope: Scope, subject: str) -> NotFound:
    return NotFound(f"There is no quota of the {scope} {subject[:140]!r}; list the quotas for those there are.")
