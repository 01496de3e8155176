"""Accounts whose credit comes and goes in every way there is, for tests that look at them meanwhile."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from metering import grant_changes, policies
from metering.grants import NewGrant, issue
from metering.ledger import AccountRef
from tests.support.stack import Stack


async def busy(stack: Stack, account: AccountRef, enough: asyncio.Event) -> int:
    """Sessions that end in every way, and credit that comes and goes, until it is enough."""
    done = 0
    while not enough.is_set():
        done += 1
        name = f"{account.id}-{done}"
        await asyncio.gather(*(stack.spend(account, 40, (done * 7 + i) % 60) for i in range(3)))
        await stack.ledger.void(await stack.hold(account, 25))
        if done % 5 == 0:
            ends = datetime.now(UTC) + timedelta(milliseconds=50)
            await issue(stack.pool, stack.ledger, NewGrant(name, account.id, 500, priority=1, expires_at=ends))
        if done % 7 == 0:
            await grant_changes.adjust(stack.pool, stack.ledger, grant_changes.NewAdjustment(name, account.id, 30))
        if done % 11 == 0:
            await issue(stack.pool, stack.ledger, NewGrant(f"{name}-r", account.id, 300))
            await grant_changes.revoke(stack.pool, stack.ledger, grant_changes.NewRevocation(f"{name}-r", f"{name}-r"))
    return done


async def in_debt(stack: Stack, enough: asyncio.Event) -> int:
    """An account that lives on its credit line, and repays now and then."""
    account, done = await stack.account("postpaid"), 0
    await policies.change(stack.pool, stack.ledger, account.id, "postpaid", 10_000)
    while not enough.is_set():
        done += 1
        await stack.spend(account, 40, 35)
        if done % 20 == 0:
            await stack.grant(account, f"postpaid-{done}", 900)
    return done
