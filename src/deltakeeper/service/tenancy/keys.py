"""Keys of the service: random, shown once, and known afterwards by their hash alone.

A key has 256 random bits, so a plain SHA-256 keeps it: nothing can be tried out against it, and a slow hash would only
slow down every request.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.engine import RowMapping

from deltakeeper.service.errors import BadRequest, NotFound
from deltakeeper.service.tenancy.database import State
from deltakeeper.service.tenancy.tables import KEYS

KeyRole = Literal["admin", "tenant", "monitor"]
PREFIX = "dk-"
MOST_MODELS = 10_000
_MODEL = re.compile(r"[A-Za-z0-9._/:@-]{1,256}")
_ID = re.compile(r"key-[0-9a-z]{1,28}")  # anything else, such as a zero byte, never gets to the database
_LOOKUP = 8  # bytes of a hash that are looked up; the whole of it is compared in constant time


@dataclass(frozen=True)
class Key:
    """What is known of a key.

    Attributes:
        id: public, for logs, quotas and revoking.
        name: what its maker calls it.
        role: `admin` keys manage and may ask all models, `monitor` keys read metrics alone.
        models: names that a tenant's key may ask; None for all.
        created_at: seconds since 1970, as are the others.
        expires_at: None for never.
        revoked_at: None if it was not.
        digest: SHA-256 of the key.
    """

    id: str
    name: str
    role: KeyRole
    models: frozenset[str] | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    digest: bytes = field(repr=False)

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        """Whether it opens anything at a time."""
        if self.revoked_at is not None:
            return "revoked"
        return "active" if self.expires_at is None or now < self.expires_at else "expired"

    def to_json(self, now: float) -> dict[str, object]:
        """What may be shown of it."""
        return {
            "id": self.id,
            "name": self.name,
            "role": self.role,
            "models": "all" if self.models is None else sorted(self.models),
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "revoked_at": self.revoked_at,
            "state": self.state(now),
        }


@dataclass(frozen=True)
class NewKey:
    """A key that was just made, with its secret: the only time that this is there to be shown."""

    key: Key
    secret: str = field(repr=False)


class KeyRing:
    """The keys in a state.

    Args:
        state: where they are kept.
        now: seconds since 1970.
    """

    def __init__(self, state: State, now: Callable[[], float] = time.time) -> None:
        self._state = state
        self._now = now

    def create(
        self,
        name: str,
        role: KeyRole,
        models: Iterable[str] | None = None,
        *,
        expires_in: float | None = None,
    ) -> NewKey:
        """Make a key.

        Args:
            name: 1 to 128 printable characters, for people.
            role: what it may do.
            models: that a tenant's key may ask, at least one; None for all. Others have None.
            expires_in: seconds, 1 at least; None for never.

        Raises:
            BadRequest: one of these is out of range.
            StateError: the state cannot be written.
        """
        bound = _check(name, role, models, expires_in)
        secret, now = PREFIX + secrets.token_urlsafe(32), int(self._now())
        key = Key(
            id=f"key-{secrets.token_hex(6)}",
            name=name,
            role=role,
            models=bound,
            created_at=now,
            expires_at=None if expires_in is None else now + int(expires_in),
            revoked_at=None,
            digest=hash_secret(secret),
        )
        values = {
            "id": key.id,
            "name": name,
            "role": role,
            "models": None if bound is None else sorted(bound),
            "created_at": key.created_at,
            "expires_at": key.expires_at,
            "digest": key.digest.hex(),
        }
        with self._state.writing() as connection:
            connection.execute(insert(KEYS).values(**values))
        return NewKey(key, secret)

    def revoke(self, key_id: str) -> Key:
        """Take a key back for good; one that is revoked already stays as it is.

        Raises:
            NotFound: there is none with this id.
        """
        now = int(self._now())
        with self._state.writing() as connection:
            key = _find(connection, key_id)
            unrevoked = (KEYS.c.id == key_id) & KEYS.c.revoked_at.is_(None)
            connection.execute(update(KEYS).where(unrevoked).values(revoked_at=now))
        return key if key.revoked_at is not None else replace(key, revoked_at=now)

    def get(self, key_id: str) -> Key:
        """A key by its id; raises `NotFound`."""
        with self._state.reading() as connection:
            return _find(connection, key_id)

    def all(self) -> list[Key]:
        """All keys that were ever made, oldest first."""
        with self._state.reading() as connection:
            rows = connection.execute(select(KEYS).order_by(KEYS.c.created_at, KEYS.c.id)).mappings()
            return [_key(row) for row in rows]


def hash_secret(secret: str) -> bytes:
    """What is kept of a key: its SHA-256."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def index_keys(keys: Iterable[Key]) -> Mapping[bytes, Key]:
    """Keys by the beginning of their hash, for `find_key`."""
    return {key.digest[:_LOOKUP]: key for key in keys}


def find_key(index: Mapping[bytes, Key], secret: str) -> Key | None:
    """The key with a secret, whatever state it is in; how long it takes tells nothing of the keys there are."""
    digest = hash_secret(secret)
    found = index.get(digest[:_LOOKUP])
    same = hmac.compare_digest(digest, bytes(len(digest)) if found is None else found.digest)
    return found if same else None


def _check(name: str, role: KeyRole, models: Iterable[str] | None, expires_in: float | None) -> frozenset[str] | None:
    if not (1 <= len(name) <= 128 and name.isprintable()):
        raise BadRequest("A key's name has 1 to 128 printable characters; give another one.", param="name")
    if expires_in is not None and not 1 <= expires_in <= 10**10:
        raise BadRequest("A key expires after 1 second at least; give a later time, or none.", param="expires_in")
    if role == "admin":
        if models is not None:
            raise BadRequest("An admin key may ask all models; leave the models out.", param="models")
        return None
    if role == "monitor":
        if models is not None:
            raise BadRequest("A monitor's key asks no models; leave them out.", param="models")
        return frozenset()
    bound = None if models is None else frozenset(models)
    if bound is not None and not 1 <= len(bound) <= MOST_MODELS:
        raise BadRequest(f"A tenant's key is bound to 1 to {MOST_MODELS:,} models; name them.", param="models")
    for model in sorted(bound or ()):
        if not _MODEL.fullmatch(model):
            raise BadRequest(f"No model is called {model[:140]!r}; name one that is served.", param="models")
    return bound


def _find(connection: Connection, key_id: str) -> Key:
    query = select(KEYS).where(KEYS.c.id == key_id)
    row = connection.execute(query).mappings().one_or_none() if _ID.fullmatch(key_id) else None
    if row is None:
        raise NotFound(f"There is no key {key_id[:64]!r}; list the keys for their ids.", param="key_id")
    return _key(row)


def _key(row: RowMapping) -> Key:
    return Key(
        id=row["id"],
        name=row["name"],
        role=row["role"],
        models=None if row["models"] is None else frozenset(row["models"]),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
        digest=bytes.fromhex(row["digest"]),
    )
