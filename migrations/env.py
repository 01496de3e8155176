"""Alembic's environment: runs the scripts on the connection that `migrations.upgrade` hands over.

Must not: open a connection itself, or configure logging.
"""

from __future__ import annotations

from alembic import context

import accounts.tables  # noqa: F401
import metering.tables  # noqa: F401  (both imports register tables)
from migrations import include_name
from storage.base import METADATA

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=METADATA, include_name=include_name)
with context.begin_transaction():
    context.run_migrations()
