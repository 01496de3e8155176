"""The content of every price version that sessions point at, kept in Postgres for ever.

Must not: change a version: its id is the hash of its content.
"""

from __future__ import annotations

import msgspec

from config.catalog import Catalog
from storage.database import Pool


async def keep(pool: Pool, catalog: Catalog) -> None:
    """Store the catalog's version unless it is there. Raises `storage.database.FAILED`."""
    content = msgspec.json.encode(catalog.routes).decode()
    await pool.execute(
        "INSERT INTO price_version (id, content) VALUES ($1, $2::jsonb) ON CONFLICT (id) DO NOTHING",
        catalog.version,
        content,
    )
