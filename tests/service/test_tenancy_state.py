"""The state in its database: made, brought up to date, shared, killed, and refused where it is something else."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from tenancy_cases import open_place, state_place  # noqa: F401

from deltakeeper.errors import TenantError
from deltakeeper.service.errors import NotFound
from deltakeeper.service.tenancy.database import SCHEMA_TABLE, StateError, open_state
from deltakeeper.service.tenancy.keys import KeyRing
from deltakeeper.service.tenancy.quotas import Limits, Quota, QuotaBook
from deltakeeper.service.tenancy.tables import METADATA
from deltakeeper.service.tenancy.tenants import TenantRegister

WRITER = """
import sys
from deltakeeper.service.tenancy.database import open_state
from deltakeeper.service.tenancy.keys import KeyRing
from deltakeeper.service.tenancy.quotas import Limits, Quota, QuotaBook
state = open_state(sys.argv[1])
keys, quotas = KeyRing(state), QuotaBook(state)
while True:
    key = keys.create("written", "tenant", ["a"]).key
    quotas.set(Quota("key", key.id, Limits(requests_per_minute=7)))
    keys.revoke(key.id)
    print(key.id, flush=True)
"""


def test_migrations_make_the_tables_that_the_code_reads(state):
    with state.reading() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": SCHEMA_TABLE})
        ours = [d for d in compare_metadata(context, METADATA) if "deltakeeper" in str(d)]
    assert ours == []


def test_a_state_is_there_again_when_it_is_opened_again(place):
    first = open_state(place)
    made = KeyRing(first).create("one", "tenant", ["a", "b"])
    QuotaBook(first).set(Quota("model", "a", Limits(concurrent=3)))
    TenantRegister(first).record("a", "a", planes=1, manifest_sha256="0" * 64)
    first.close()
    second = open_state(place)
    assert KeyRing(second).all() == [made.key]
    assert QuotaBook(second).all() == [Quota("model", "a", Limits(concurrent=3))]
    assert [(t.name, t.planes) for t in TenantRegister(second).all()] == [("a", 1)]
    second.close()


def test_what_was_committed_survives_a_kill(place):
    process = subprocess.Popen([sys.executable, "-c", WRITER, place], stdout=subprocess.PIPE, text=True)
    told = [process.stdout.readline().strip() for _ in range(20)]
    process.send_signal(signal.SIGKILL)  # while it writes on
    told += process.stdout.read().split("\n")[:-1]
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    opened = open_state(place)
    keys = {key.id: key for key in KeyRing(opened).all()}
    assert len(told) >= 20 and all(keys[key_id].revoked_at is not None for key_id in told)
    limits = {quota.subject: quota.limits for quota in QuotaBook(opened).all()}
    assert all(limits[key_id] == Limits(requests_per_minute=7) for key_id in told)
    KeyRing(opened).create("after", "admin")  # no lock is left behind
    if "://" not in place:
        with opened.reading() as connection:
            assert connection.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"
    opened.close()


def test_states_opened_and_written_at_once_lose_nothing(place):
    """Eight threads with a state each migrate and write together, as processes that start at the same time do."""
    failures = []

    def write(number):
        try:
            own = open_state(place)
            for turn in range(5):
                KeyRing(own).create(f"{number}-{turn}", "admin")
            own.close()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    opened = open_state(place)
    assert len({key.name for key in KeyRing(opened).all()}) == 40
    assert opened.revision() == 40
    opened.close()


def test_a_write_that_fails_changes_nothing(state):
    before = state.revision()
    with pytest.raises(ZeroDivisionError), state.writing() as connection:
        connection.execute(text("DELETE FROM deltakeeper_revision"))
        raise ZeroDivisionError
    assert state.revision() == before


def test_a_file_is_for_its_owner_alone_and_syncs_a_log(tmp_path):
    path = tmp_path / "deep" / "state.db"
    opened = open_state(path)
    KeyRing(opened).create("one", "admin")
    with opened.reading() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar_one() == 2  # FULL
        files = sorted(path.parent.iterdir())
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600} and len(files) == 3
    opened.close()


def test_a_later_version_is_not_written_to(place):
    opened = open_state(place)
    with opened.writing() as connection:
        connection.execute(text(f"UPDATE {SCHEMA_TABLE} SET version_num = '9999'"))
    opened.close()
    with pytest.raises(StateError, match="later version of deltakeeper; update it"):
        open_state(place)


def test_what_is_no_state_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but somebody's notes, long enough to be read as a header of one" * 9)
    before = path.read_bytes()
    with pytest.raises(StateError, match=r"notes\.txt cannot be used"):
        open_state(path)
    assert path.read_bytes() == before
    with pytest.raises(StateError, match="cannot be opened"):
        open_state(tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://root:hidden@host/db",
        "postgresql://u:hidden@127.0.0.1:1/db",
        "postgresql://u:hidden@h:port/x",
        "postgresql://u@127.0.0.1:1/db?password=hidden",
    ],
)
def test_urls_that_lead_nowhere_are_told_without_their_password(url):
    with pytest.raises(StateError) as told:
        open_state(url)
    assert "hidden" not in str(told.value) and str(told.value).endswith(".")
    assert told.value.status == 503


def test_a_damaged_file_is_told_in_a_sentence(tmp_path):
    path = tmp_path / "state.db"
    opened = open_state(path)
    for number in range(50):
        KeyRing(opened).create(f"key {number}", "admin")
    opened.close()
    raw = bytearray(path.read_bytes())
    raw[4096:] = os.urandom(len(raw) - 4096)
    path.write_bytes(raw)
    with pytest.raises(StateError, match="check that it is reachable and whole"):
        KeyRing(open_state(path)).all()


def test_versions_of_a_tenant_are_kept_in_order(state):
    now = [100]
    register = TenantRegister(state, lambda: now[0])
    register.record("a", "first", manifest_sha256="1" * 64)
    now[0] = 200
    assert register.record("a", "first", manifest_sha256="1" * 64).since == 100  # the same again
    register.record("a", "second", planes=2, manifest_sha256="2" * 64)
    now[0] = 300
    register.record("b", "other")
    assert [(t.name, t.folder, t.since) for t in register.all()] == [("a", "second", 200), ("b", "other", 300)]
    register.forget("a")
    assert [(v.folder, v.since, v.until) for v in register.versions("a")] == [("first", 100, 200), ("second", 200, 300)]
    assert [t.name for t in register.all()] == ["b"]
    with pytest.raises(NotFound):
        register.forget("a")
    with pytest.raises(TenantError):
        register.record("../a", "x")


def test_tables_are_made_by_steps_that_can_be_undone(tmp_path):
    from alembic import command
    from alembic.config import Config

    from deltakeeper.service.tenancy import database

    opened = open_state(tmp_path / "state.db")
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    with opened.writing() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    opened.close()
    with sqlite3.connect(tmp_path / "state.db") as raw:
        left = [name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    raw.close()
    assert left == [SCHEMA_TABLE]
