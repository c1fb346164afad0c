"""Keys, quotas, tenants and their versions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the first tables."""
    revision_table = op.create_table(
        "deltakeeper_revision",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("number", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(revision_table, [{"id": 1, "number": 0}])
    op.create_table(
        "deltakeeper_keys",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("models", sa.JSON),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("revoked_at", sa.BigInteger),
    )
    op.create_table(
        "deltakeeper_quotas",
        sa.Column("scope", sa.String(16), primary_key=True),
        sa.Column("subject", sa.String(256), primary_key=True),
        sa.Column("requests_per_minute", sa.BigInteger),
        sa.Column("tokens_per_minute", sa.BigInteger),
        sa.Column("concurrent", sa.BigInteger),
    )
    op.create_table(
        "deltakeeper_tenants",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("folder", sa.String(1024), nullable=False),
        sa.Column("planes", sa.Integer),
        sa.Column("manifest_sha256", sa.String(64)),
        sa.Column("since", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "deltakeeper_versions",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("folder", sa.String(1024), nullable=False),
        sa.Column("planes", sa.Integer),
        sa.Column("manifest_sha256", sa.String(64)),
        sa.Column("since", sa.BigInteger, nullable=False),
        sa.Column("until", sa.BigInteger),
    )
    op.create_index("deltakeeper_versions_tenant", "deltakeeper_versions", ["tenant"])


def downgrade() -> None:
    """Drop them, and all keys with them."""
    for table in ("versions", "tenants", "quotas", "keys", "revision"):
        op.drop_table(f"deltakeeper_{table}")
