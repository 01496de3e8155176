"""Receipts: what a gateway knows of its settlements and holds until Postgres has them, for the day Redis loses some.

A worker keeps them in memory (`Receipts`), and writes them into Postgres when a recovery asks (`Keeper`), through the
table `receipt`: durable, so that a recovery may be killed and gone on with, and open to gateways of every host.
Must not: settle or hold anything (`rebuild` does), or make a call wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

from metering.journal_fields import month_of
from metering.ledger import Outcome, SessionRef
from storage.database import FAILED, Connection, connect
from storage.redis_client import RedisError

log = logging.getLogger(__name__)

ASKED_KEY: Final = "recovery:asked"
"""Names the recovery that asks for receipts, in Redis for an hour."""
HELD, OWED, SETTLED = 0, 1, 2
KEEP_S: Final = 60.0
KEEP_MAX: Final = 100_000
LOOK_S: Final = 0.25
SEEN_S: Final = 1.0
ALIVE_S: Final = 4.0
"""A gateway that was not seen for so long is not waited for."""


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """One session: its hold (`kind` HELD), or the settlement of `charge` micros that is OWED or was acknowledged
    (SETTLED) as entry (`epoch`, `entry`); zeros where that is not known. `fence` is the hold's moment, in ms."""

    session: str
    account: str
    shard: int
    key: str
    fence: int
    kind: int
    epoch: int = 0
    entry: int = 0
    charge: int = 0
    outcome: str = "swept"
    metadata: bytes = b""
    held: int = 0
    metered: int = 0
    seq: int = 0
    prompt: int = 0
    owner: str = ""
    body: str = ""
    price: str = ""


class _Kept(msgspec.Struct, gc=False):
    ref: SessionRef
    charge: int
    outcome: str
    metadata: bytes
    epoch: int
    entry: int
    at: float


class Receipts:
    """One worker's receipts, in the order in which they were owed. Bounded by time and number once acknowledged."""

    def __init__(
        self, price_version: str = "", suspect: Callable[[int, int, str], None] = lambda shard, epoch, reason: None
    ) -> None:
        self._price_version = price_version
        self._suspect = suspect
        self._kept: dict[str, _Kept] = {}
        self._highest: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def owed(self, ref: SessionRef, charge: int, outcome: Outcome, metadata: bytes) -> None:
        """A settlement is about to be asked for."""
        self._kept[ref.session] = _Kept(ref, charge, outcome, metadata, 0, 0, 0.0)

    def acknowledged(self, session: str, epoch: int, entry: int, charged: int, *, repeated: bool) -> None:
        """The ledger has made it entry `entry` and charged so much, which is what the client was told, so it is what a
        recovery charges too. An entry that is not above the highest of its epoch says that Redis went
        back in time."""
        kept = self._kept.get(session)
        if kept is None:
            return
        kept.epoch, kept.entry, kept.charge, kept.at = epoch, entry, charged, time.monotonic()
        if repeated or not epoch:
            return
        at = (kept.ref.account.shard, epoch)
        if entry <= self._highest.get(at, 0):
            self._suspect(*at, f"answered entry {entry} after {self._highest[at]}")
        self._highest[at] = entry

    def dropped(self, session: str) -> None:
        """Nothing is owed for the session any more: somebody else has ended it, or it can never be settled."""
        self._kept.pop(session, None)

    def prune(self, cursors: Mapping[int, tuple[int, int]]) -> None:
        """Forget what Postgres has, what is older than `KEEP_S`, and the oldest above `KEEP_MAX`."""
        old, over = time.monotonic() - KEEP_S, len(self._kept) - KEEP_MAX
        gone: list[str] = []
        for session, kept in self._kept.items():
            if kept.at == 0.0:
                continue  # still owed
            epoch, n = cursors.get(kept.ref.account.shard, (0, 0))
            arrived = 0 < kept.epoch == epoch and kept.entry <= n  # of a lost epoch nothing is known to have arrived
            if arrived or kept.at < old or len(gone) < over:
                gone.append(session)
        for session in gone:
            del self._kept[session]

    def all(self) -> list[Receipt]:
        """Every receipt, oldest first."""
        return [
            Receipt(
                session=session,
                account=kept.ref.account.id,
                shard=kept.ref.account.shard,
                key=kept.ref.key,
                fence=kept.ref.fence,
                kind=SETTLED if kept.at else OWED,
                epoch=kept.epoch,
                entry=kept.entry,
                charge=kept.charge,
                outcome=kept.outcome,
                metadata=kept.metadata,
                price=self._price_version,
            )
            for session, kept in self._kept.items()
        ]


class Redis(Protocol):
    """The part of the Redis client that the keeper needs."""

    def call(self, *args: str | bytes | int) -> Awaitable[Any]:
        """Send one command; the awaited result is its reply."""


class Keeper:
    """A worker's part in recoveries: says that it lives, forgets what arrived, and delivers when it is asked.

    `holds` answers the sessions that run now. Postgres may be away: then receipts are kept by time.
    """

    def __init__(
        self,
        redis: Redis,
        database_url: str,
        receipts: Receipts,
        holds: Callable[[], Iterable[Receipt]],
        gateway: str,
    ) -> None:
        self._redis = redis
        self._url = database_url
        self._receipts = receipts
        self._holds = holds
        self._gateway = gateway
        self._delivered = ""
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look, until `aclose`."""
        self._task = asyncio.create_task(self._run(), name="receipts")

    async def aclose(self) -> None:
        """Stop, and say that this gateway is gone."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        with contextlib.suppress(*FAILED):
            if self._connection is not None:
                await self._connection.execute("DELETE FROM gateway WHERE id = $1", self._gateway)
        self._drop()

    async def _run(self) -> None:
        seen = 0.0
        while True:
            try:
                if time.monotonic() - seen >= SEEN_S:
                    await self._see()
                    seen = time.monotonic()
                await self._look()
            except FAILED:
                self._drop()
                self._receipts.prune({})
                seen = time.monotonic()
            except RedisError:
                pass  # it is looked for again at once
            await asyncio.sleep(LOOK_S)

    async def _connected(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            self._connection = await connect(self._url, application_name="tollgate receipts", command_s=5.0)
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _see(self) -> None:
        connection = await self._connected()
        await connection.execute(
            "INSERT INTO gateway (id, delivered) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET seen_at = now()",
            self._gateway,
            self._delivered,
        )
        rows = await connection.fetch("SELECT shard, ep, n FROM shard_cursor")
        self._receipts.prune({row["shard"]: (row["ep"], row["n"]) for row in rows})

    async def _look(self) -> None:
        asked = await self._redis.call("GET", ASKED_KEY)
        name = "" if asked is None else asked.decode()
        if name in ("", self._delivered):
            return
        connection = await self._connected()
        mine = [*self._holds(), *self._receipts.all()]
        await save(connection, mine)
        await connection.execute("UPDATE gateway SET delivered = $2 WHERE id = $1", self._gateway, name)
        self._delivered = name
        log.warning("recovery %s: delivered %d receipts", name, len(mine))


_SAVE = """
    INSERT INTO receipt AS kept (sid, shard, month, kind, seq, content)
    SELECT * FROM unnest($1::text[], $2::smallint[], $3::date[], $4::smallint[], $5::bigint[], $6::text[])
    ON CONFLICT (sid) DO UPDATE SET kind = excluded.kind, seq = excluded.seq, content = excluded.content
    WHERE (kept.kind, kept.seq) <= (excluded.kind, excluded.seq)"""


async def save(connection: Connection, receipts: Sequence[Receipt]) -> None:
    """Write receipts; of two about one session the later kind and checkpoint stays. Raises FAILED."""
    latest: dict[str, Receipt] = {}
    for one in sorted(receipts, key=lambda one: (one.kind, one.seq)):
        latest[one.session] = one
    rows = [
        (sid, one.shard, month_of(sid, one.fence), one.kind, one.seq, msgspec.json.encode(one).decode())
        for sid, one in sorted(latest.items())
    ]
    if rows:
        await connection.execute(_SAVE, *map(list, zip(*rows, strict=True)))


_OPEN = """
    SELECT content, applied_epoch FROM receipt r WHERE shard = ANY($1::smallint[]) AND NOT EXISTS
        (SELECT FROM session s WHERE s.month = r.month AND s.sid = r.sid)"""


async def unarrived(connection: Connection, shards: Sequence[int]) -> list[tuple[Receipt, int | None]]:
    """Receipts of sessions that Postgres has no row of, with the epoch that they were last applied in, oldest first."""
    rows = await connection.fetch(_OPEN, list(shards))
    found = [(_decode(row["content"]), row["applied_epoch"]) for row in rows]
    return sorted(found, key=lambda pair: (pair[0].epoch, pair[0].entry, pair[0].fence))


_ENDED = """
    SELECT s.sid, s.shard, s.account_id, s.key_id, s.outcome, s.charged, s.absorbed, s.n, s.ended_at,
        r.content, c.n AS corrected, c.charged AS more, c.absorbed AS more_absorbed
    FROM receipt r JOIN session s ON s.month = r.month AND s.sid = r.sid
    LEFT JOIN correction c ON s.outcome = 'swept' AND c.sid = s.sid AND c.account_id = s.account_id
    WHERE r.shard = ANY($1::smallint[])"""


async def ended(connection: Connection, shards: Sequence[int]) -> list[Any]:
    """Sessions of receipts that Postgres has: their rows, the receipt's `content`, and of the correction that has
    arrived `corrected` (its entry), `more` and `more_absorbed` (micros), which are None without one."""
    return await connection.fetch(_ENDED, list(shards))


def fence_of(content: str) -> int:
    """The fence in a stored receipt."""
    return _decode(content).fence


async def mark_applied(connection: Connection, epochs: Mapping[str, int]) -> None:
    """Note the epoch in which each session's receipt was applied."""
    if epochs:
        await connection.execute(
            "UPDATE receipt SET applied_epoch = done.epoch FROM unnest($1::text[], $2::int[]) AS done(sid, epoch) "
            "WHERE receipt.sid = done.sid",
            list(epochs),
            list(epochs.values()),
        )


async def clean(connection: Connection) -> None:
    """Remove receipts that have arrived or are a day old, and gateways that are long gone."""
    await connection.execute(
        "DELETE FROM receipt r WHERE at < now() - interval '1 day' OR EXISTS "
        "(SELECT FROM session s WHERE s.month = r.month AND s.sid = r.sid)"
    )
    await connection.execute("DELETE FROM gateway WHERE seen_at < now() - interval '1 hour'")


async def all_delivered(connection: Connection, recovery: str) -> bool:
    """Whether every gateway that lives has delivered to this recovery."""
    waiting = await connection.fetchval(
        "SELECT count(*) FROM gateway WHERE delivered <> $1 AND seen_at > now() - $2 * interval '1 second'",
        recovery,
        ALIVE_S,
    )
    return int(waiting) == 0


_decode = msgspec.json.Decoder(Receipt).decode
