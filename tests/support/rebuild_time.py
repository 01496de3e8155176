"""How long it takes to make all shards anew: `python -m tests.support.rebuild_time [accounts [grants [holds]]]`.

Accounts with grants and a finished session each, and open holds whose gateway delivers its receipts; then Redis loses
everything. Printed are the rebuild's own time and the whole recovery's, from the loss on. The audit has the last word.
Must not: decide what is too slow.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import migrations
from metering import grants
from metering.keys import shard_of
from metering.ledger import AccountRef
from metering.recovery import Recovery
from storage.database import connect
from tests.support.postgres import PostgresServer
from tests.support.recovering import Teller, agree, teller, verified
from tests.support.redis_server import RedisServer
from tests.support.stack import Stack, open_stack

ACCOUNTS, GRANTS, HOLDS = 10_000, 3, 1_000
AT_ONCE = 200
CREDIT = 1_000_000


async def in_turns(work: Callable[[Any], Awaitable[object]], each: Sequence[Any]) -> None:
    """All of it, some at once."""
    for at in range(0, len(each), AT_ONCE):
        await asyncio.gather(*(work(one) for one in each[at : at + AT_ONCE]))


async def prepare(stack: Stack, gateway: Teller, accounts: int, given: int, holds: int) -> None:
    """The accounts with what they have and do."""
    owners = [AccountRef(f"account-{number}", shard_of(f"account-{number}")) for number in range(accounts)]
    now = datetime.now(UTC).replace(microsecond=0)
    rows = [(owner.id, owner.id, owner.shard) for owner in owners]
    connection = await connect(stack.database_url)
    await connection.copy_records_to_table("account", records=rows, columns=("id", "name", "shard"))
    given_rows = [
        (f"g{number}-{owner.id}", owner.id, CREDIT, 50, now, now, "") for owner in owners for number in range(given)
    ]
    columns = ("id", "account_id", "amount", "priority", "effective_at", "created_at", "notes")
    await connection.copy_records_to_table("grant_", records=given_rows, columns=columns)
    await connection.close()
    assert (await grants.apply_pending(stack.pool, stack.ledger)).count == accounts * given
    await in_turns(lambda owner: gateway.spend(owner, 100), owners)
    await stack.drained()
    await in_turns(lambda owner: gateway.hold(owner, 500), owners[:holds])


async def measure(stack: Stack, counts: Iterable[int]) -> None:
    """Lose everything, recover, audit, and print."""
    accounts, given, holds = counts
    await verified(stack)
    async with teller(stack) as gateway:
        await prepare(stack, gateway, accounts, given, holds)
        await stack.redis.call("FLUSHALL")
        began = time.monotonic()
        await gateway.deliver()
        delivered = time.monotonic() - began
        steps: list[tuple[str, float]] = []
        recovery = Recovery(
            stack.redis,
            stack.database_url,
            pool=stack.pool,
            on_step=lambda step: steps.append((step, time.monotonic())),
        )
        done = await recovery.recover()
        whole = time.monotonic() - began
        assert done is not None
        print(f"{done.accounts} accounts with {given} grants each, {done.held} holds, {done.failed} refused")
        print(f"receipts delivered in {delivered:.2f} s, rebuilt in {done.seconds:.2f} s, recovered in {whole:.2f} s")
        ends = [*(moment for _, moment in steps[1:]), began + whole]
        print(" ".join(f"{name} {end - start:.2f}" for (name, start), end in zip(steps, ends, strict=True)))
        for held in list(gateway.live.values()):
            await gateway.settle(held, 50)
        await agree(stack, gateway.told)


async def run(url: str, server: RedisServer, counts: Iterable[int]) -> None:
    """On these stores."""
    stack = await open_stack(url, server)
    try:
        await measure(stack, counts)
    finally:
        await stack.close()


def main() -> None:
    """The command line."""
    words = [int(word) for word in sys.argv[1:4]]
    counts = [*words, *(ACCOUNTS, GRANTS, HOLDS)[len(words) :]]
    postgres = PostgresServer()
    try:
        postgres.start()
        asyncio.run(migrations.upgrade(postgres.url()))
        with tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as folder:
            server = RedisServer(Path(folder), appendonly=True)
            server.start()
            try:
                asyncio.run(run(postgres.url(), server, counts))
            finally:
                server.kill()
    finally:
        postgres.remove()


if __name__ == "__main__":
    main()
