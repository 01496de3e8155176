"""The online audit: all the time a few accounts, each compared with Postgres to the micro while it is used.

Each round picks accounts in turn, accounts whose journal has just moved, and one that differed before; their snapshots
are compared as `reconcile` does, once Postgres has the journal up to them. One connection and one query at a time,
paced. Must not: repair, write, hold up anything, or call an account clean that it could not look at.
"""

from __future__ import annotations

import asyncio
import logging
import random
import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, Literal, TypeVar

from metering import audit_queries as rows
from metering import journal_store, reconcile
from metering.journal_store import Cursor
from metering.keys import SHARDS
from metering.ledger import AccountRef, LedgerError, LedgerFrozen, LedgerUnavailable
from metering.ledger_calls import answered
from metering.reconcile import AuditedLedger, Difference, Redis, Taken
from storage.database import FAILED, Connection, connect
from storage.redis_client import RedisError

log = logging.getLogger(__name__)

T = TypeVar("T")

PICKS: Final = 4
"""Accounts of a round, or one or two more where some are to be looked at again."""
JUST_MOVED: Final = 2
"""At most so many of them because their journal has just moved; the others in turn."""
WAIT_S: Final = 5.0
"""How long a round waits for the journal."""
STATEMENT_S: Final = 5.0
"""An account whose history takes Postgres longer than this for one sum is left to `tollgate audit` ..."""
SLOW_S: Final = 3_600.0
"""... and not tried again for this long."""
ROUND_S: Final = 60.0
REST: Final = 9
"""For each second that a round kept the stores busy it rests so many."""
RETRY_S: Final = 1.0
"""The shortest pause after trouble."""
LEASES_MAX: Final = 1_000
"""Open sessions of a shard: a snapshot lists them all, and its script stands in the way of everybody meanwhile."""
KEPT_MAX: Final = 1_000
"""Accounts that are remembered because they differ, are slow, or are to be looked at again."""

# A plan that reads a whole table (or sorts a whole index) is never worth it for one account; nothing here writes.
_CAREFUL: Final = (
    "SET default_transaction_read_only = on; SET enable_seqscan = off; SET enable_hashjoin = off; "
    f"SET enable_mergejoin = off; SET jit = off; SET statement_timeout = {int(2_000 * STATEMENT_S)}"
)
_RETRIED: Final[tuple[type[Exception], ...]] = (*FAILED, RedisError, LedgerError)

Skip = Literal["frozen", "stopped", "rebuilt", "behind", "busy", "slow", "sessions"]
"""Why an account was not, or not wholly, compared: its shard is frozen, or its journal stopped; the shard was made anew
meanwhile; the journal did not arrive in time; sessions opened too fast to read them all; its history is too long; its
shard has too many open sessions."""


@dataclass(frozen=True, slots=True)
class Look:
    """One account in one round. `fresh` are the differences that were not told before; `differs` says whether there are
    any, `healed` that there are none any more. What was `skipped` is not clean (busy: the rest was compared)."""

    account: AccountRef
    skipped: Skip | None = None
    fresh: tuple[Difference, ...] = ()
    differs: bool = False
    healed: bool = False


@dataclass(frozen=True, slots=True)
class _Seen:
    """A differing account and what was told of it."""

    ref: AccountRef
    told: frozenset[tuple[str, int]]


class OnlineAudit:
    """`on_look` is called with each account looked at and must not raise. `stopped` names the shards whose journal is
    stopped. `statement_s` bounds one sum, `wait_s` a round's waiting for the journal."""

    def __init__(
        self,
        redis: Redis,
        ledger: AuditedLedger,
        database_url: str,
        *,
        every_ms: int = 1_000,
        stopped: Callable[[], Collection[int]] = tuple,
        on_look: Callable[[Look], None] = lambda look: None,
        wait_s: float = WAIT_S,
        statement_s: float = STATEMENT_S,
    ) -> None:
        self._redis = redis
        self._ledger = ledger
        self._url = database_url
        self._every_s = every_ms / 1000
        self._stopped = stopped
        self._on_look = on_look
        self._wait_s = wait_s
        self._statement_s = statement_s
        self._connection: Connection | None = None
        self._after: str | None = None
        self._cursors: dict[int, Cursor] = {}
        self._differing: dict[str, _Seen] = {}
        self._again: dict[str, AccountRef] = {}
        self._slow: dict[str, float] = {}
        self._busy_s = 0.0
        self._compared_at = asyncio.get_running_loop().time()

    @property
    def differing(self) -> int:
        """How many accounts differed when they were last looked at, of those that this process has looked at."""
        return len(self._differing)

    @property
    def age_s(self) -> float:
        """Seconds since a round last compared something (or there was no account to compare)."""
        return asyncio.get_running_loop().time() - self._compared_at

    async def run(self) -> None:
        """Audit until cancelled. Stores that fail are told once and tried again."""
        told = ""
        try:
            while True:
                pause_s = self._every_s
                try:
                    await self.round()
                    if told:
                        log.warning("online audit: goes on")
                    told = ""
                except _RETRIED as error:
                    self._drop()
                    store = "Redis" if isinstance(error, RedisError | LedgerError) else "Postgres"
                    if store != told:
                        log.warning("online audit: %s: %s: %s; trying again", store, type(error).__name__, error)
                    told, pause_s = store, max(pause_s, RETRY_S)
                await asyncio.sleep(max(pause_s, REST * self._busy_s))
        finally:
            self._drop()

    async def aclose(self) -> None:
        """Give the connection back. `run` does so by itself."""
        self._drop()

    async def round(self) -> list[Look]:
        """Look at a few accounts, within a minute. Raises FAILED, RedisError and LedgerError: a store is in trouble."""
        self._busy_s = 0.0
        async with asyncio.timeout(ROUND_S):
            picked = await self._pick()
            looks = await self._compare_all(picked) if picked else []
        if not picked or any(look.skipped in (None, "busy") for look in looks):
            self._compared_at = asyncio.get_running_loop().time()
        return looks

    # --- picking

    async def _pick(self) -> list[AccountRef]:
        began, connection = asyncio.get_running_loop().time(), await self._connected()
        picked = {ref.id: ref for ref in (self._oldest_differing(), *self._again.values()) if ref is not None}
        self._again.clear()
        for ref in await self._just_moved(connection):
            picked.setdefault(ref.id, ref)
        for ref in await self._in_turn(connection, max(PICKS - len(picked), PICKS - JUST_MOVED)):
            picked.setdefault(ref.id, ref)
        self._spent(began)
        return list(picked.values())

    def _oldest_differing(self) -> AccountRef | None:
        """The differing account that was not looked at for the longest time: is it mended?"""
        first = next(iter(self._differing), None)
        if first is None:
            return None
        self._differing[first] = seen = self._differing.pop(first)
        return seen.ref

    async def _just_moved(self, connection: Connection) -> list[AccountRef]:
        """Accounts of entries that arrived since the last round, each entry as likely as any other. A few rows by their
        primary key, whatever the load: the cursors say between which numbers the entries are."""
        before, self._cursors = self._cursors, await journal_store.cursors(connection)
        news: list[tuple[int, int, int, int]] = []
        for shard, (epoch, n) in self._cursors.items():
            then = before.get(shard, (0, 0))
            if then[0] == epoch and n > then[1]:
                news.append((shard, epoch, then[1], n))
        if not news:
            return []
        chosen = random.choices(news, [n - since for *_, since, n in news], k=JUST_MOVED)  # noqa: S311
        entries = [(shard, epoch, random.randint(since + 1, n)) for shard, epoch, since, n in chosen]  # noqa: S311
        return [AccountRef(*found) for found in await rows.accounts_of(connection, entries)]

    async def _in_turn(self, connection: Connection, count: int) -> list[AccountRef]:
        """The next accounts by id, from the first again after the last. Where it begins is drawn, so that processes
        that are several, or are restarted again and again, do not all look at the first accounts."""
        if self._after is None:
            self._after = _between(await rows.account_ends(connection))
        page = await rows.accounts_after(connection, self._after, count)
        if len(page) < count:
            page |= await rows.accounts_after(connection, "", count - len(page))
        self._after = next(reversed(page), "")
        return [AccountRef(name, shard) for name, shard in page.items()]

    # --- looking

    async def _compare_all(self, picked: Sequence[AccountRef]) -> list[Look]:
        """Snapshots first: while Postgres is waited for because of one, the journal of the others arrives too."""
        loop = asyncio.get_running_loop()
        known = await rows.accounts(await self._connected(), [ref.id for ref in picked])
        present = {(ref.id, ref.shard) for ref in picked}
        strange = reconcile.strangers(known, present)
        began = loop.time()
        taken = [(ref, await self._take(ref)) for ref in picked]
        self._spent(began)
        ends, looks = loop.time() + self._wait_s, []
        for ref, one in taken:
            found = [each for each in strange if each.account == ref.id]
            look = await self._looked_at(ref, one, found, ends)
            looks.append(look)
            self._on_look(look)
        return looks

    async def _take(self, ref: AccountRef) -> Taken | Difference | Skip:
        if ref.shard in self._stopped():
            return "stopped"
        if self._slow.get(ref.id, 0.0) > asyncio.get_running_loop().time():
            return "slow"
        try:
            if await answered(self._redis.call("ZCARD", SHARDS[ref.shard].leases)) > LEASES_MAX:
                return "sessions"
            return await reconcile.take(self._ledger, self._redis, ref)
        except LedgerFrozen:
            return "frozen"
        except LedgerUnavailable:
            raise
        except LedgerError as error:
            return reconcile.unreadable(ref, error)

    async def _looked_at(
        self, ref: AccountRef, taken: Taken | Difference | Skip, found: list[Difference], ends: float
    ) -> Look:
        skipped: Skip | None = None
        if isinstance(taken, Difference):
            found.append(taken)
        elif isinstance(taken, Taken):
            skipped, compared = await self._compared(taken, ends)
            found += compared
        else:
            skipped = taken
        if found or skipped is None:
            return self._told(ref, found, skipped)
        return Look(ref, skipped, differs=ref.id in self._differing)

    async def _compared(self, taken: Taken, ends: float) -> tuple[Skip | None, Sequence[Difference]]:
        """What differs, and why not everything could be compared. Raises FAILED and LedgerError."""
        connection = await self._connected()
        at = await reconcile.awaited(connection, taken, ends - asyncio.get_running_loop().time())
        skipped: Skip | None
        if reconcile.arrived(taken, at):
            skipped, found = await self._across(connection, taken)
        else:
            skipped, found = "behind", taken.found
        # What was found is told without a second look: both sides are of one journal position, whose rows never change,
        # so a look at a later position could only miss what this one saw. The two things that are not read in the
        # instant of the snapshot (the list of open sessions, and their time to live) `reconcile.take` reads again by
        # itself, which hides nothing: a session that is lost stays lost. But where the shard was frozen meanwhile, what
        # was read may be half of one history and half of the next; it is looked at in the next round.
        if at is not None and at[0] > taken.snapshot.epoch:
            return "rebuilt", ()
        if found and await self._epoch(taken.ref.shard) != taken.snapshot.epoch:
            self._again[taken.ref.id] = taken.ref
            return "rebuilt", ()
        return skipped, found

    async def _across(self, connection: Connection, taken: Taken) -> tuple[Skip | None, Sequence[Difference]]:
        began = asyncio.get_running_loop().time()
        try:
            found = await reconcile.compare(connection, taken)
        except TimeoutError:
            if connection.is_closed():
                raise
            self._drop()  # the statement may still run there; the server ends it
            _keep(self._slow, taken.ref.id, began + SLOW_S)
            return "slow", taken.found
        finally:
            self._spent(began)
        return ("busy" if taken.busy else None), found

    def _told(self, ref: AccountRef, found: Sequence[Difference], skipped: Skip | None) -> Look:
        """Remember what differs, to tell it once, and again only when it was away or is another amount."""
        seen = self._differing.pop(ref.id, None)
        told = seen.told if seen is not None else frozenset()
        now = frozenset((one.what, one.micros) for one in found)
        if found:
            _keep(self._differing, ref.id, _Seen(ref, now if skipped is None else now | told))
        fresh = tuple(one for one in found if (one.what, one.micros) not in told)
        return Look(ref, skipped, fresh, bool(found), healed=seen is not None and not found)

    # --- plumbing

    async def _epoch(self, shard: int) -> int:
        return int(await answered(self._redis.call("HGET", SHARDS[shard].meta, "ep")) or 0)

    async def _connected(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            made = await connect(self._url, application_name="tollgate audit", command_s=self._statement_s)
            self._connection = made
            await made.execute(_CAREFUL)
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
        self._connection = None

    def _spent(self, began: float) -> None:
        self._busy_s += asyncio.get_running_loop().time() - began


def _keep(kept: dict[str, T], name: str, value: T) -> None:
    """Remember, and forget the oldest when there are too many."""
    kept.pop(name, None)
    kept[name] = value
    if len(kept) > KEPT_MAX:
        del kept[next(iter(kept))]


def _between(ends: tuple[str, str]) -> str:
    """A text between two ids, or near them, drawn."""
    first, last = ends
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    low, high = sorted(ord(one[same : same + 1] or "z") for one in ends)
    drawn = [chr(random.randint(low, high)), *random.choices(string.ascii_letters, k=3)]  # noqa: S311
    return first[:same] + "".join(drawn)
