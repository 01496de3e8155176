"""The one SQLAlchemy MetaData: every table of the project hangs on it, with predictable constraint names.

Must not: define a table, connect anywhere, or be imported by a data worker (SQLAlchemy costs them memory).
"""

from __future__ import annotations

from sqlalchemy import MetaData

METADATA = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)
"""Names are part of the schema: a migration drops a constraint by the name that this convention gave it."""
