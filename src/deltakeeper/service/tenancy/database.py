"""The state's database: a file of SQLite, or PostgreSQL by URL, brought up to date when it is opened.

SQLite runs with a write-ahead log and syncs each commit to disk, so that a key that was revoked stays revoked whatever
happens to the process or the machine. Every write is one transaction that also counts up a revision: processes that
share a state (a service and `deltakeeper keys`) see by it that something changed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, select, text, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from deltakeeper.service.errors import Unavailable
from deltakeeper.service.tenancy.tables import REVISION

SCHEMA_TABLE = "deltakeeper_schema"
"""Where alembic keeps which steps were run; its usual name could be taken in a database that others use too."""
BUSY_SECONDS = 10
"""How long a writer waits for another one, and a connection for a server that does not answer."""
_WRITES = "deltakeeper_writes"
_LOCK = 0x64656C74  # "delt": whoever else locks something in this database will hardly use this number
_MIGRATIONS = Path(__file__).parent / "migrations"


class StateError(Unavailable):
    """The state cannot be opened, read or written."""


class State:
    """An open database whose tables are up to date; safe on any thread. Made by `open_state`.

    Attributes:
        where: the file or the URL, without a password.
    """

    def __init__(self, engine: Engine, where: str) -> None:
        self.where = where
        self._engine = engine

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one moment of the state; raises `StateError`."""
        with _told(self.where), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction, committed when the block ends and undone if it fails; one writer at a time.

        Raises:
            StateError: it could not be committed; nothing has changed then.
        """
        with _told(self.where), _writing(self._engine) as connection:
            # First, since on PostgreSQL the lock on this row is what keeps other writers out.
            connection.execute(update(REVISION).values(number=REVISION.c.number + 1))
            yield connection

    def revision(self) -> int:
        """A number that every write counts up; raises `StateError`."""
        with self.reading() as connection:
            return int(connection.execute(select(REVISION.c.number)).scalar_one())

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def open_state(where: str | Path, *, make: bool = True) -> State:
    """Open a state, or make a new one; runs the migrations that it lacks.

    Args:
        where: a file of SQLite, or `postgresql://user:password@host/database`.
        make: make the file (mode 0600) if it is not there.

    Raises:
        StateError: it cannot be reached, is something else, or was written by a later version of deltakeeper.
    """
    url = _url(where)
    if url.get_backend_name() == "sqlite":
        name = str(url.database)
        if not make and not Path(name).exists():
            raise StateError(f"There is no state {name}; give the one of the service, or make its first key.")
        _make_private(Path(name))
    else:
        name = url.set(query={}).render_as_string(hide_password=True)  # options may hold secrets too
    try:
        engine = _engine(url)
    except (ImportError, NoSuchModuleError, TypeError) as error:
        raise StateError(
            f"{name} needs a driver for PostgreSQL that is not installed; install deltakeeper[postgres]."
        ) from error
    try:
        with _told(name), _writing(engine) as connection:
            _migrate(connection)
    except BaseException:
        engine.dispose()
        raise
    return State(engine, name)


def _url(where: str | Path) -> URL:
    if isinstance(where, Path) or "://" not in where:
        return URL.create("sqlite", database=str(Path(where).expanduser().absolute()))
    scheme, rest = where.split("://", 1)
    driver = "postgresql" if scheme == "postgres" else scheme  # as many hosts call it
    try:
        url = make_url(f"{driver}://{rest}")
    except (ArgumentError, ValueError):
        raise StateError("The URL of the state cannot be read; write postgresql://user@host/database.") from None
    if url.get_backend_name() != "postgresql":
        raise StateError(
            f"A state is kept in a file or in PostgreSQL, not by {url.get_backend_name()}; "
            "give a file's path, or postgresql://user@host/database."
        )
    return url


def _engine(url: URL) -> Engine:
    options: dict[str, Any] = {"hide_parameters": True}  # what is written must not turn up in errors and logs
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS}, **options)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    waits = {"connect_timeout": BUSY_SECONDS} if url.get_driver_name() in ("psycopg", "psycopg2") else {}
    return create_engine(url, connect_args=waits, pool_pre_ping=True, **options)


@contextmanager
def _writing(engine: Engine) -> Iterator[Connection]:
    with engine.connect().execution_options(**{_WRITES: True}) as connection, connection.begin():
        yield connection


def _prepare_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver would begin late, and end transactions before it alters tables
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later fails if another one wrote in between; so writers say it at once.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":  # of processes that start together one migrates and the others wait
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _make_private(path: Path) -> None:
    """Make an empty file that only its owner reads; SQLite gives its log beside it the same mode."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, stat.S_IRUSR | stat.S_IWUSR))
    except OSError as error:
        raise StateError(f"{path} cannot be opened ({error.strerror}); give a file that may be written.") from error


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Tell of a failure in one sentence, without what was to be written."""
    try:
        yield
    except CommandError as error:
        raise StateError(f"The state {where} was written by a later version of deltakeeper; update it.") from error
    except SQLAlchemyError as error:
        reason = (str(getattr(error, "orig", None) or type(error).__name__).strip().splitlines() or ["no reason"])[0]
        raise StateError(
            f"The state {where} cannot be used ({reason.rstrip('.')}); check that it is reachable and whole.",
            retry_after=5,
        ) from error
