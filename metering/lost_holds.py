"""What lost holds had, after a rebuild, where it must not just be available: of revoked grants it comes back voided, of
a debtor's it repays his debt, as when they had ended.

The sessions that held it are not known any more, or took less of it when they were held again. One session for each
account stands in for them: it holds what is left of such grants and is voided by the ledger's own script, so
that the journal has an entry for every micro. Must not: run on a shard that is open to others.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Final

from metering.keys import SHARDS
from metering.ledger import AccountRef, LedgerError, SessionRef, Settled
from metering.redis_ledger import RedisLedger
from storage.redis_open import Redis

KEY: Final = "rebuild"
"""The key id of such sessions; no key of an account has one so short."""
METADATA: Final = b'{"ending":"lost_hold"}'


async def void(
    redis: Redis, ledger: RedisLedger, account: AccountRef, grants: Sequence[str], at: tuple[int, int]
) -> int:
    """Return what these grants of the account have available by a void; micros. `at` is the epoch and the shard's time
    in ms. Raises LedgerError and RedisError: then the rebuild begins again."""
    shard = SHARDS[account.shard]
    names = [f"{gid}:{part}" for gid in grants for part in ("a", "h")]
    found = [int(value or 0) for value in await redis.call("HMGET", shard.grants + account.id, *names)]
    rests = {gid: found[2 * place : 2 * place + 2] for place, gid in enumerate(grants) if found[2 * place]}
    if not rests:
        return 0
    epoch, now = at
    digest = hashlib.sha256(account.id.encode()).hexdigest()[:24]
    ref = SessionRef(f"{KEY}-{epoch}-{digest}", account, KEY, now)
    parts = [word for gid, (a, h) in rests.items() for word in (f"{gid}:a", 0, f"{gid}:h", h + a)]
    rest = sum(a for a, _ in rests.values())
    slices = ",".join(f"{gid}={a}" for gid, (a, _) in rests.items())
    own = ("st", "H", "f", now, "u", account.id, "k", KEY, "h", rest, "m", 0, "q", 0, "pc", 0, "pv", "", "ts", now)
    await asyncio.gather(
        redis.call("HSET", shard.grants + account.id, *parts),
        redis.call("HINCRBY", shard.account + account.id, "av", -rest),
        redis.call("HINCRBY", shard.account + account.id, "hd", rest),
        redis.call("HINCRBY", shard.account + account.id, "ns", 1),
        redis.call("HSET", shard.session + ref.session, *own, "mt", METADATA, "sl", slices),
        redis.call("ZADD", shard.leases, now, f"{account.id}|{ref.session}"),
    )
    reply = await ledger.void(ref)
    if not isinstance(reply, Settled):
        raise LedgerError(f"what {account.id} has left of lost holds was not returned: {reply}")
    await redis.call("UNLINK", shard.limits + KEY)
    return rest
