"""A shard's admission state made anew: from Postgres, what survived in its outbox and holds, and gateways' receipts.

Every step may be repeated, and the whole may be killed anywhere and begun again: what only Redis knew is written to
the table `receipt` before anything of Redis is removed, the cursor moves to a new epoch before anything is written
under it, and the epoch is opened to others last. Must not: decide that a shard is lost, run twice at once (`recovery`
has the lock), or make an entry by other means than the ledger's own scripts.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from metering import grants, lost_holds, rebuilt_accounts, receipts, salvage
from metering.journal import Flusher
from metering.keys import SHARDS
from metering.ledger import AccountRef, LedgerError, LedgerUnavailable, SessionRef
from metering.receipts import HELD, Receipt
from metering.redis_ledger import RedisLedger
from storage.database import Connection, Pool
from storage.redis_open import Redis, servers

log = logging.getLogger(__name__)

STEPS: Final = ("freeze", "drain", "salvage", "cursor", "wipe", "write", "grants", "settle", "hold", "void", "open")
BATCH: Final = 200
DAY_MS: Final = 86_400_000
_OWNED = re.compile(rb"(?:[agbsr]:|[LXo]:)\{v([0-9]{3})\}")
_LIMITS = b"r:"


@dataclass(slots=True)
class Rebuilt:
    """What a rebuild did."""

    shards: tuple[int, ...]
    accounts: int = 0
    settled: int = 0
    held: int = 0
    failed: int = 0
    """Receipts that the ledger refused: their sessions are named in the log and stay in the table."""
    voided: int = 0
    """Micros that lost holds had of revoked grants, or of grants of an account in debt."""
    seconds: float = 0.0


@dataclass(slots=True)
class _Keys:
    """A shard's keys as they survived."""

    remove: list[bytes] = field(default_factory=list)
    limits: list[bytes] = field(default_factory=list)
    sessions: list[bytes] = field(default_factory=list)


class Rebuilder:
    """Rebuilds shards on these stores. `on_step` is told each step's name before it begins."""

    def __init__(
        self,
        redis: Redis,
        pool: Pool,
        database_url: str,
        *,
        lease_ms: int = 15_000,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        self._redis = redis
        self._pool = pool
        self._url = database_url
        self._lease_ms = lease_ms
        self._on_step = on_step
        self._ledger = RedisLedger(redis, lease_ms=lease_ms)

    async def rebuild(self, shards: Sequence[int]) -> Rebuilt:
        """Make these shards anew. Receipts that were asked for before are in their table by now.

        Raises LedgerError, RedisError and `storage.database.FAILED`: then the shards stay frozen; call again."""
        began = time.monotonic()
        done = Rebuilt(tuple(sorted(shards)))
        self._on_step("freeze")
        former = await self._frozen(done.shards)
        async with self._pool.acquire() as connection:
            self._on_step("drain")
            await self._drain(connection, former)
            self._on_step("salvage")
            keys = await self._keys(done.shards)
            await self._salvage(connection, keys)
            self._on_step("cursor")
            epochs = await _next_epochs(connection, former)
            self._on_step("wipe")
            await self._wipe(keys)
            self._on_step("write")
            done.accounts, returned = await self._write(connection, epochs)
            self._on_step("grants")
            await self._apply_grants(epochs)
            await self._apply(connection, done, epochs)
        self._on_step("void")
        await self._void(done, returned, epochs)
        self._on_step("open")
        await self._all(("HDEL", SHARDS[shard].meta, "fz") for shard in done.shards)
        done.seconds = time.monotonic() - began
        return done

    async def renew(self, shards: Sequence[int]) -> list[int]:
        """Give shards that are whole a new epoch, for another server may go on in theirs: two histories of one epoch
        would share numbers, and Postgres could take only one entry of each. Answers those that Postgres is not at the
        end of by now: they stay frozen, and must be rebuilt. Raises LedgerError, RedisError and FAILED."""
        former = await self._frozen(shards)
        async with self._pool.acquire() as connection:
            await self._drain(connection, former)
            ends = await asyncio.gather(*(self._redis.call("HGET", SHARDS[shard].meta, "n") for shard in former))
            at = list(former), list(former.values()), [int(end or 0) for end in ends]
            renewed = {row["shard"]: row["ep"] for row in await connection.fetch(_RENEW, *at)}
        for shard, epoch in renewed.items():
            meta = SHARDS[shard].meta
            await self._redis.call("HSET", meta, "ep", epoch, "n", 0, "op", await self._now(meta))
            await self._redis.call("HDEL", meta, "was")
        return [shard for shard in former if shard not in renewed]

    async def late(self) -> int:
        """Settle and hold again what gateways delivered after their shard was opened; how many sessions those were.

        Raises LedgerError, RedisError and FAILED."""
        done = Rebuilt(())
        async with self._pool.acquire() as connection:
            found = await receipts.unarrived(connection, range(len(SHARDS)))
            if found:
                await self._ledger.start()
                await self._mark_ended(connection, range(len(SHARDS)))
                fresh = [one for one, epoch in found if epoch != self._ledger.epoch_of(one.shard) != 0]
                await self._apply_all(connection, done, fresh)
            await receipts.clean(connection)
        return done.settled + done.held

    # --- what survived

    async def _frozen(self, shards: Sequence[int]) -> dict[int, int]:
        """Stop the shards; the epoch that each had, 0 for none."""
        found = {}
        for shard in shards:
            answer = await self._ledger.freeze(shard)
            was = answer[0] if answer is not None else b""
            found[shard] = int(was or 0)
        return found

    async def _drain(self, connection: Connection, former: dict[int, int]) -> None:
        """Entries that go on from the cursor arrive as they are. A forked outbox reuses numbers, so nothing of it does:
        its shard's cursor leaves the epoch at once, and its sessions are salvaged one by one."""
        forked = await salvage.forked(self._redis, connection, sorted(former))
        if forked:
            log.warning("rebuild: the outboxes of shards %s are of another history than Postgres", sorted(forked))
            await _next_epochs(connection, {shard: former[shard] for shard in forked})
        flusher = Flusher(self._redis, self._url, shards=sorted(former.keys() - forked))
        try:
            await flusher.drain()
        finally:
            await flusher.aclose()

    async def _keys(self, shards: Sequence[int]) -> dict[int, _Keys]:
        found = {shard: _Keys() for shard in shards}
        for server in servers(self._redis):
            cursor: bytes | str = "0"
            while cursor != b"0":
                cursor, names = await server.call("SCAN", cursor, "COUNT", 1_000)
                for name in names:
                    match = _OWNED.match(name)
                    keys = found.get(int(match[1])) if match else None
                    if keys is not None:
                        kind = keys.limits if name.startswith(_LIMITS) else keys.remove
                        (keys.sessions if name.startswith(b"s:") else kind).append(name)
        return found

    async def _salvage(self, connection: Connection, keys: dict[int, _Keys]) -> None:
        """Write down what survived. Sessions that ended and have arrived, and tombstones, stay in Redis: a repeat of
        their settlement or reserve must find them."""
        for shard, mine in keys.items():
            kept = await salvage.shard(self._redis, connection, shard, mine.sessions)
            mine.remove += [name for name in mine.sessions if name not in kept]

    async def _wipe(self, keys: dict[int, _Keys]) -> None:
        await self._all(
            ("UNLINK", *mine.remove[at : at + BATCH])
            for mine in keys.values()
            for at in range(0, len(mine.remove), BATCH)
        )
        await self._all(("HDEL", name, "p") for mine in keys.values() for name in mine.limits)

    # --- what Postgres says

    async def _write(
        self, connection: Connection, epochs: dict[int, int]
    ) -> tuple[int, list[tuple[AccountRef, list[str]]]]:
        """Accounts with their grants, then the new epoch, not open yet (`fz`). How many accounts there are, and which
        grants have something left that goes back through a void."""
        count, returned, commands = 0, list[tuple[AccountRef, list[str]]](), list[rebuilt_accounts.Command]()
        async for made in rebuilt_accounts.accounts(connection, epochs):
            count += 1
            commands += made.commands
            returned += [(made.account, made.returned)] if made.returned else []
            if len(commands) >= BATCH:
                await self._all(commands)
                commands.clear()
        await self._all(commands)
        for shard, epoch in epochs.items():
            meta = SHARDS[shard].meta
            now = await self._now(meta)
            await self._redis.call("HSET", meta, "ep", epoch, "n", 0, "clk", now, "fz", 1, "op", now)
            await self._redis.call("HDEL", meta, "was")
            self._ledger.adopt(shard, epoch)
        return count, returned

    async def _void(
        self, done: Rebuilt, returned: Sequence[tuple[AccountRef, list[str]]], epochs: dict[int, int]
    ) -> None:
        """What is left of them once the holds that are known took theirs."""
        for at in range(0, len(returned), BATCH):
            batch = returned[at : at + BATCH]
            voids = (self._void_one(account, gids, epochs[account.shard]) for account, gids in batch)
            done.voided += sum(await asyncio.gather(*voids))

    async def _void_one(self, account: AccountRef, gids: list[str], epoch: int) -> int:
        now = await self._now(SHARDS[account.shard].meta)
        return await lost_holds.void(self._redis, self._ledger, account, gids, (epoch, now))

    async def _now(self, meta: str) -> int:
        """The shard's time, which never goes back."""
        (seconds, micros), saved = await asyncio.gather(self._redis.call("TIME"), self._redis.call("HGET", meta, "clk"))
        return max(int(seconds) * 1_000 + int(micros) // 1_000, int(saved or 0))

    # --- what gateways and survivors say

    async def _apply_grants(self, epochs: dict[int, int]) -> None:
        """Grants whose entry was lost: sessions below were paid from them."""
        waiting = (await grants.apply_pending(self._pool, self._ledger)).waiting
        if waiting:
            log.warning("rebuild: %d grants wait: %s", len(waiting), dict(list(waiting.items())[:5]))

    async def _apply(self, connection: Connection, done: Rebuilt, epochs: dict[int, int]) -> None:
        found = [one for one, _ in await receipts.unarrived(connection, list(epochs))]
        self._on_step("settle")
        await self._mark_ended(connection, list(epochs))
        await self._apply_all(connection, done, [one for one in found if one.kind != HELD])
        self._on_step("hold")
        await self._apply_all(connection, done, [one for one in found if one.kind == HELD])

    async def _mark_ended(self, connection: Connection, shards: Sequence[int]) -> None:
        """Sessions that have arrived while their owner may not know: a repeat of their settlement finds this answer."""
        rows = await receipts.ended(connection, shards)
        for at in range(0, len(rows), BATCH):
            await asyncio.gather(*(self._mark_one(row) for row in rows[at : at + BATCH]))

    async def _mark_one(self, row: Any) -> None:
        name = SHARDS[row["shard"]].session + row["sid"]
        if not await self._redis.call("EXISTS", name):
            await self._redis.call("HSET", name, *(word for pair in _ended(row).items() for word in pair))
            await self._redis.call("PEXPIRE", name, DAY_MS)

    async def _apply_all(self, connection: Connection, done: Rebuilt, found: Sequence[Receipt]) -> None:
        for at in range(0, len(found), BATCH):
            batch = found[at : at + BATCH]
            answers = await asyncio.gather(*(self._again(one) for one in batch))
            fine = [one for one, applied in zip(batch, answers, strict=True) if applied]
            applied = {one.session: self._ledger.epoch_of(one.shard) for one in fine}
            await receipts.mark_applied(connection, applied)
            done.failed += len(batch) - len(applied)
            done.held += sum(one.kind == HELD for one in batch if one.session in applied)
            done.settled += sum(one.kind != HELD for one in batch if one.session in applied)

    async def _again(self, receipt: Receipt) -> bool:
        """Hold the session again and, where it had ended, settle it. Whether the ledger did so."""
        try:
            if receipt.kind == HELD:
                await self._ledger.reassert(receipt, self._lease_ms)
                return True
            swept = receipt.outcome == "swept"  # the sweeper does it again, at what was metered
            whole = msgspec.structs.replace(receipt, held=receipt.charge, metered=receipt.charge)
            if await self._ledger.reassert(whole, 1 if swept else self._lease_ms) and not swept:
                await self._settle(receipt)
        except LedgerUnavailable:
            raise
        except LedgerError as error:
            log.error("rebuild: session %s (%d micros) is refused: %s", receipt.session, receipt.charge, error)
            return False
        return True

    async def _settle(self, receipt: Receipt) -> None:
        account = salvage.account_of(receipt)
        ref = SessionRef(receipt.session, account, receipt.key, receipt.fence)
        if receipt.outcome == "void":
            await self._ledger.void(ref, receipt.metadata)
        else:
            await self._ledger.settle(ref, receipt.charge, salvage.outcome_of(receipt), receipt.metadata)

    async def _all(self, commands: Iterable[Sequence[Any]]) -> None:
        """Send commands, some at once."""
        sent: list[Awaitable[Any]] = []
        for command in commands:
            sent.append(self._redis.call(*command))
            if len(sent) == BATCH:
                await asyncio.gather(*sent)
                sent.clear()
        await asyncio.gather(*sent)


def _ended(row: Any) -> dict[str, str | int]:
    """The fields of a session that ended, as its script left them, and those of its correction."""
    fields = {"st": "T", "f": receipts.fence_of(row["content"]), "u": row["account_id"], "k": row["key_id"]}
    fields |= {"o": row["outcome"], "c": row["charged"], "ab": row["absorbed"], "n": row["n"]}
    if row["outcome"] == "swept":
        fields["te"] = grants.to_ms(row["ended_at"])
    if row["corrected"] is not None:
        fields |= {"c": row["charged"] + row["more"], "ab": row["absorbed"] + row["more_absorbed"]}
        fields |= {"cr": row["corrected"], "cc": row["more"], "ca": row["more_absorbed"]}
    return fields


_RENEW = """
    UPDATE shard_cursor AS kept SET ep = kept.ep + 1, n = 0, updated_at = now()
    FROM unnest($1::smallint[], $2::int[], $3::bigint[]) AS whole(shard, ep, n)
    WHERE (kept.shard, kept.ep, kept.n) = (whole.shard, whole.ep, whole.n) RETURNING kept.shard, kept.ep"""


async def _next_epochs(connection: Connection, former: dict[int, int]) -> dict[int, int]:
    """Move the cursors to a new epoch: from here on nothing of the old one can be flushed, by anybody."""
    rows = await connection.fetch(
        "INSERT INTO shard_cursor AS kept (shard, ep, n) SELECT shard, ep + 1, 0 "
        "FROM unnest($1::smallint[], $2::int[]) AS made(shard, ep) ON CONFLICT (shard) DO UPDATE "
        "SET ep = greatest(kept.ep + 1, excluded.ep), n = 0, updated_at = now() RETURNING shard, ep",
        list(former),
        list(former.values()),
    )
    return {row["shard"]: row["ep"] for row in rows}
