"""A smoke of the chaos runner: one gateway of two is killed, replies of Valkey are lost, Postgres is away for 3 s; then
every record must agree, and a micro that somebody moves by hand must be found.

`make chaos` runs every fault, for longer.
"""

from __future__ import annotations

import asyncio
import contextlib

from loadtests.chaos import check, collect, runner
from loadtests.chaos.check import UNBILLED_TOKENS, ChaosVerdict
from loadtests.chaos.faults import LONG
from loadtests.chaos.proxy import Toxic
from loadtests.chaos.stage import Fault, Stage
from loadtests.chaos.world import World, world

SEED = "smoke"
SECONDS, CLIENTS, LEASE_S = 7.0, 8, 3.0
OUTAGE_S = 3.0


class EverythingAtOnce(Fault):
    """A kill, lost replies and an outage within a few seconds."""

    number, name, title = 0, "smoke", "a gateway killed, replies lost, Postgres away"
    mix = LONG

    async def strike(self, stage: Stage) -> None:
        first, second = stage.world.gateways
        await stage.rest(1.0, 1.5)
        await asyncio.to_thread(first.kill)
        await asyncio.to_thread(stage.world.postgres.stop)
        second.links["valkey"].spoil(Toxic(lose_replies=True))
        await asyncio.sleep(OUTAGE_S / 2)
        second.links["valkey"].calm()
        stage.counts["replies lost"] = second.links["valkey"].counts["replies lost"]
        await asyncio.sleep(OUTAGE_S / 2)
        await asyncio.to_thread(stage.world.postgres.start)
        first.start()
        await stage.world.ready()


async def examined(made: World) -> ChaosVerdict:
    """What the check says of the accounts and the audit now."""
    verdict = ChaosVerdict()
    for state in await collect.account_states(made, made.accounts):
        check.check_account(state, verdict)
    check.check_audit(await made.tollgate("audit", "--wait-s", "2", codes=(0, 1)), verdict)
    return verdict


async def test_no_micro_is_lost_or_created_when_everything_fails_at_once_and_a_moved_one_is_found() -> None:
    async with world(gateways=2, accounts=1, lease_s=LEASE_S) as made:
        result = await runner.run(made, EverythingAtOnce(), SEED, seconds=SECONDS, clients=CLIENTS)
        assert (result.findings, result.micros) == ([], 0), result.document()
        assert result.sessions > 20
        assert result.calls["completed"] > 10
        assert result.counts["replies lost"] > 0
        assert result.drained_s < collect.DRAIN_S
        assert result.unbilled_max <= UNBILLED_TOKENS
        await move_a_micro_in_redis(made)
        await move_a_micro_in_postgres(made)
        moved = await examined(made)
        assert moved.micros >= 2
        assert [finding for finding in moved.findings if "I2 available is the sum of the grants" in finding] != []
        assert [finding for finding in moved.findings if "a session's charge is what its entry earned" in finding] != []


async def move_a_micro_in_redis(made: World) -> None:
    """The account has one less than its grants."""
    account = made.accounts[0]
    store = made.redis()
    async with contextlib.aclosing(store):
        await store.hincrby(account.shard.account + account.id, "av", -1)


async def move_a_micro_in_postgres(made: World) -> None:
    """One session's row says that one more was charged."""
    connection = await made.postgres_connection()
    try:
        await connection.execute(
            "UPDATE session SET charged = charged + 1 WHERE sid = (SELECT max(sid) FROM session WHERE charged > 0)"
        )
    finally:
        await connection.close()
