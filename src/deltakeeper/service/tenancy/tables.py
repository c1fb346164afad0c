"""The tables of the state. A change here needs a migration in `migrations/versions`; a test compares the two.

Times are seconds since 1970, UTC. Revoked keys and versions of tenants that are gone stay, as the record of what was.
"""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, Index, Integer, MetaData, String, Table

METADATA = MetaData()

REVISION = Table(
    "deltakeeper_revision",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
)
"""One row, counted up by every write: by it whoever has read the state can tell that it is still the same."""

KEYS = Table(
    "deltakeeper_keys",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("models", JSON(none_as_null=True)),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
)
"""`digest` is the SHA-256 of the key in hexadecimal digits; `models` a list of names, null for all."""

QUOTAS = Table(
    "deltakeeper_quotas",
    METADATA,
    Column("scope", String(16), primary_key=True),
    Column("subject", String(256), primary_key=True),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrent", BigInteger),
)
"""`scope` is key or model; `subject` the key's id or the model's name, `*` for each that has no quota of its own."""

TENANTS = Table(
    "deltakeeper_tenants",
    METADATA,
    Column("name", String(128), primary_key=True),
    Column("folder", String(1024), nullable=False),
    Column("planes", Integer),
    Column("manifest_sha256", String(64)),
    Column("since", BigInteger, nullable=False),
)
"""`folder` is relative to the folder of deltas; `planes` null for all."""

VERSIONS = Table(
    "deltakeeper_versions",
    METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("tenant", String(128), nullable=False),
    Column("folder", String(1024), nullable=False),
    Column("planes", Integer),
    Column("manifest_sha256", String(64)),
    Column("since", BigInteger, nullable=False),
    Column("until", BigInteger),
    Index("deltakeeper_versions_tenant", "tenant"),
)
"""What each tenant was, and from when until when; `until` is null for what it is now."""
