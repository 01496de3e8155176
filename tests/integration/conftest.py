"""What integration tests share: one Postgres for a run, with fresh databases (imported by each
module it would be many), and a Valkey for each module that asks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.cli import data_dir_fixture, document_fixture, run_fixture
from tests.support.postgres import empty_database_fixture, ledger_database_fixture, postgres_server_fixture
from tests.support.redis_server import RedisServer
from tests.support.stack import stack_fixture
from tests.support.valkey import Stand, stand_on, valkey

__all__ = [
    "data_dir_fixture",
    "document_fixture",
    "empty_database_fixture",
    "ledger_database_fixture",
    "postgres_server_fixture",
    "run_fixture",
    "stack_fixture",
]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A Valkey for the tests of one module."""
    with valkey() as running:
        yield running


@pytest.fixture
async def stand(server: RedisServer) -> AsyncIterator[Stand]:
    """The ledger on it, empty."""
    async with stand_on(server) as ready:
        yield ready
