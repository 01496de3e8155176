"""What `make prove-drain` measures, in small: entries as the scripts write them, all their rows, and a clean audit."""

from __future__ import annotations

from metering import audit_queries
from metering.journal_quick import settle_quickly
from metering.journal_rows import Rows
from metering.keys import SHARDS
from tests.support.drain_fill import Filler, open_accounts
from tests.support.journal_entries import sums
from tests.support.stack import Stack


async def test_a_full_outbox_arrives_whole_and_every_rule_of_the_audit_holds(stack: Stack) -> None:
    payers = await open_accounts(stack, 6)
    await Filler(stack, payers).fill(300)
    assert await stack.flusher(batch_max=50).drain() == 300 + 1 + 2 * len(payers)
    counted = await sums(stack)
    assert (counted["sessions"], counted["rolled_sessions"], counted["balance"]) == (301, 301, 0)
    assert counted["charged"] == counted["rolled_charged"] == counted["earned"] == counted["consumed"]
    assert await audit_queries.broken_rules(stack.pool, 60) == []
    assert (await stack.outbox_length(), stack.alarms) == (0, [])


async def test_a_settlement_that_the_script_wrote_goes_the_short_way(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 1_000)
    await stack.spend(account, 100, 70)
    [(_, flat)] = await stack.redis.call("XREVRANGE", SHARDS[account.shard].outbox, "+", "-", "COUNT", 1)
    assert settle_quickly(Rows(), account.shard, 1, 2, flat)
