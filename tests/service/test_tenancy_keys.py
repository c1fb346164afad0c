"""Keys: shown once, kept as a hash, bound to models, expiring, revoked."""

from __future__ import annotations

import hashlib
import logging
from functools import partial

import pytest
from tenancy_cases import open_place, state_place  # noqa: F401

from deltakeeper.service.errors import BadRequest, NotFound
from deltakeeper.service.tenancy.database import open_state
from deltakeeper.service.tenancy.keys import KeyRing, find_key, index_keys
from deltakeeper.service.tenancy.quotas import Limits, Quota, QuotaBook


def test_a_key_is_random_and_its_hash_alone_is_kept(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    opened = open_state(tmp_path / "state.db")
    ring = KeyRing(opened)
    made = [ring.create(f"key {number}", "tenant", ["a"]) for number in range(20)]
    secrets = {new.secret for new in made}
    assert len(secrets) == 20 and all(len(secret) == 3 + 43 and secret.startswith("dk-") for secret in secrets)
    on_disk = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert (
        made[0].key.name.encode() in on_disk and hashlib.sha256(made[0].secret.encode()).hexdigest().encode() in on_disk
    )
    assert not any(secret.encode() in on_disk or secret[3:].encode() in on_disk for secret in secrets)
    assert not any(secret[3:] in text for secret in secrets for text in (caplog.text, repr(made), str(made)))
    assert made[0].key.digest.hex() not in repr(made[0]) + caplog.text + str(made[0].key.to_json(0))
    opened.close()


def test_a_key_is_found_by_its_whole_secret_alone(state):
    ring = KeyRing(state)
    mine, other = ring.create("mine", "admin"), ring.create("other", "tenant", ["a"])
    index = index_keys(ring.all())
    assert find_key(index, mine.secret) == mine.key and find_key(index, other.secret) == other.key
    for wrong in (mine.secret[:-1], mine.secret + "x", mine.secret.swapcase(), "dk-", "", "dk-\udc80"):
        assert find_key(index, wrong) is None


def test_a_hash_that_begins_alike_is_not_enough(state):
    made = KeyRing(state).create("one", "admin")
    like = hashlib.sha256(b"guess").digest()[:8] + made.key.digest[8:]
    assert find_key({like[:8]: made.key}, "guess") is None


def test_keys_are_revoked_for_good_and_expire(state):
    now = [1000.0]
    ring = KeyRing(state, lambda: now[0])
    short, long = ring.create("short", "tenant", ["a"], expires_in=60), ring.create("long", "tenant", None)
    assert (short.key.expires_at, short.key.state(1059.9), short.key.state(1060)) == (1060, "active", "expired")
    assert long.key.state(10**11) == "active" and long.key.models is None
    assert ring.revoke(long.key.id).revoked_at == 1000
    now[0] = 2000.0
    assert ring.revoke(long.key.id).revoked_at == 1000
    assert ring.get(long.key.id).state(0) == "revoked"
    assert [key.id for key in ring.all()] == sorted([short.key.id, long.key.id])
    for ask in (ring.get, ring.revoke):
        with pytest.raises(NotFound, match="no key 'key-nobody'"):
            ask("key-nobody")


@pytest.mark.parametrize("odd", ["", "\0", "key-\0", "key-\ud800", "key-é", "' OR 1=1 --", "%", "*", "x" * 10**5])
def test_odd_names_are_not_found_and_do_no_harm(state, odd):
    ring, book = KeyRing(state), QuotaBook(state)
    ring.create("one", "admin")
    book.set(Quota("model", "a", Limits(concurrent=1)))
    for ask in (ring.get, ring.revoke, partial(book.get, "model"), partial(book.remove, "model")):
        with pytest.raises(NotFound):
            ask(odd)
    assert [key.revoked_at for key in ring.all()] == [None] and len(book.all()) == 1


def test_a_revoked_key_is_revoked_alone(state):
    ring = KeyRing(state)
    one, two = ring.create("one", "admin"), ring.create("two", "admin")
    before = state.revision()
    ring.revoke(one.key.id)
    assert ring.get(two.key.id).revoked_at is None and state.revision() == before + 1


@pytest.mark.parametrize(
    ("arguments", "options", "param"),
    [
        (("", "admin"), {}, "name"),
        (("a\nb", "admin"), {}, "name"),
        (("x" * 129, "admin"), {}, "name"),
        (("x", "admin", ["a"]), {}, "models"),
        (("x", "monitor", ["a"]), {}, "models"),
        (("x", "tenant", []), {}, "models"),
        (("x", "tenant", ["a b"]), {}, "models"),
        (("x", "tenant", [""]), {}, "models"),
        (("x", "tenant", [f"m{number}" for number in range(10_001)]), {}, "models"),
        (("x", "tenant", ["a"]), {"expires_in": 0.5}, "expires_in"),
        (("x", "tenant", ["a"]), {"expires_in": float("nan")}, "expires_in"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(state, arguments, options, param):
    before = state.revision()
    with pytest.raises(BadRequest) as told:
        KeyRing(state).create(*arguments, **options)
    assert told.value.param == param and state.revision() == before
