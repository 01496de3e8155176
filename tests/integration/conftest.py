"""One Postgres for all integration tests of a run, with fresh databases: imported by each module it would be many."""

from __future__ import annotations

from tests.support.postgres import empty_database_fixture, ledger_database_fixture, postgres_server_fixture
from tests.support.stack import stack_fixture

__all__ = ["empty_database_fixture", "ledger_database_fixture", "postgres_server_fixture", "stack_fixture"]
