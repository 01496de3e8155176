"""What every test shares: production's event loop, and one Postgres for all integration tests of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest

from tests.support.loops import ClosingLoop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the loop that serves in production; its transports differ from asyncio's in small ways."""
    return {"uvloop": ClosingLoop}
