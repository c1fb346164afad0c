"""What alembic runs: the steps, on the connection and in the transaction that `database` hands over."""

from __future__ import annotations

from alembic import context

from deltakeeper.service.tenancy.database import SCHEMA_TABLE
from deltakeeper.service.tenancy.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=SCHEMA_TABLE,
    render_as_batch=True,  # SQLite alters few things of a table, so later steps copy it
)
with context.begin_transaction():
    context.run_migrations()
