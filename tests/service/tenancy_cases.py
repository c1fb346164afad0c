"""What the tests of tenancy share: states to open, in SQLite and, where one is given, in PostgreSQL."""

from __future__ import annotations

import os
import uuid

import pytest
import sqlalchemy

from deltakeeper.service.tenancy.database import open_state

POSTGRES = os.environ.get("DELTAKEEPER_TEST_POSTGRES")
"""URL of a database of PostgreSQL in which the tests may make and drop schemas; without it SQLite alone is tested."""


class Clock:
    """Time that a test moves."""

    def __init__(self, at=1000.0):
        self.at = at

    def __call__(self):
        return self.at


@pytest.fixture(name="place", params=["sqlite", "postgresql"])
def state_place(request, tmp_path):
    """Where to keep a state: a new file, or a new schema."""
    if request.param == "sqlite":
        yield str(tmp_path / "state.db")
        return
    if POSTGRES is None:
        pytest.skip("DELTAKEEPER_TEST_POSTGRES names no database")
    engine = sqlalchemy.create_engine(POSTGRES)
    schema = f"test_{uuid.uuid4().hex}"
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"CREATE SCHEMA {schema}"))
    yield f"{POSTGRES}{'&' if '?' in POSTGRES else '?'}options=-csearch_path%3D{schema}"
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


@pytest.fixture(name="state")
def open_place(place):
    """An open state."""
    opened = open_state(place)
    yield opened
    opened.close()
