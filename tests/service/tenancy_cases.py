"""What the tests of tenancy share: states to open, in SQLite and, where one is given, in PostgreSQL."""

from __future__ import annotations

import uuid

import pytest
import sqlalchemy

from deltakeeper.service.tenancy.database import open_state


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
    url = request.getfixturevalue("postgres")
    engine = sqlalchemy.create_engine(url)
    schema = f"test_{uuid.uuid4().hex}"
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"CREATE SCHEMA {schema}"))
    yield f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{schema}"
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


@pytest.fixture(name="state")
def open_place(place):
    """An open state."""
    opened = open_state(place)
    yield opened
    opened.close()
