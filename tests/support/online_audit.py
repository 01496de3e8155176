"""What disturbs an online audit: sessions that open too fast, and stores that are away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from metering.ledger import AccountRef
from metering.online_audit import Look, OnlineAudit
from tests.support.stack import Stack, eventually


class Racing:
    """A ledger in which a session opens between the listing and each snapshot, so that no snapshot has them all."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._taken = 0

    async def snapshot(self, account: AccountRef) -> Any:
        """As the ledger's, but some of the sessions were not listed."""
        taken = await self._stack.ledger.snapshot(account)
        self._taken += 1
        for sid in list(taken.sessions)[: 1 + self._taken % 3]:
            del taken.sessions[sid]
        return taken


async def trouble(
    stack: Stack,
    caplog: pytest.LogCaptureFixture,
    begin: Callable[[], Awaitable[object]],
    end: Callable[[], Awaitable[object]],
) -> list[str]:
    """What an audit says of its troubles from before they begin until it has compared again afterwards."""
    looks: list[Look] = []
    audit = OnlineAudit(stack.redis, stack.ledger, stack.database_url, every_ms=5, on_look=looks.append)
    running = asyncio.create_task(audit.run())

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "metering.online_audit"]

    async def compared() -> bool:
        return any(look.skipped is None for look in looks)

    async def told() -> bool:
        return len(lines()) > 0

    await eventually(compared)
    await begin()
    await eventually(told)
    await end()
    looks.clear()
    await eventually(compared)
    running.cancel()
    await asyncio.wait([running])
    assert {look.differs for look in looks} == {False}
    return lines()
