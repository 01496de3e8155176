"""Every Redis key of Tollgate, and nothing else. The hash tag is the virtual shard, so one script is atomic over all of
an account's keys, its outbox and its indexes.

Must not: talk to Redis, or be bypassed: a key spelt anywhere else is a defect.
"""

from __future__ import annotations

from zlib import crc32

SHARD_COUNT = 128
"""Fixed at the birth of a deployment: accounts store their shard."""


class Shard:
    """One virtual shard's keys. `account`, `order`, `grants`, `session`, `limits`, `idempotency` are prefixes."""

    __slots__ = (
        "account",
        "expiries",
        "grants",
        "idempotency",
        "leases",
        "limits",
        "mark",
        "meta",
        "number",
        "order",
        "outbox",
        "session",
    )

    def __init__(self, number: int) -> None:
        tag = f"{{v{number:03d}}}"
        self.number = number
        self.meta = f"m:{tag}"  # hash ep n clk base
        self.leases = f"L:{tag}"  # zset lease deadline ms -> uid|sid
        self.expiries = f"X:{tag}"  # zset grant expiry ms -> uid|gid
        self.outbox = f"o:{tag}"  # stream, ids <ep>-<n>
        self.account = f"a:{tag}:"  # + uid: hash av hd db tc ns blk pol lim hc pr pn
        self.order = f"g:{tag}:"  # + uid: zset, score 0, burn order
        self.grants = f"b:{tag}:"  # + uid: hash <gid>:i|a|h|c|x|v|e
        self.session = f"s:{tag}:"  # + sid: hash
        self.limits = f"r:{tag}:"  # + key id: hash, a key's windows and slots
        self.mark = f"w:{tag}"  # string, empty: written before a WAIT for replicas in a cluster
        self.idempotency = f"i:{tag}:"  # + uid:hash: string


SHARDS = tuple(Shard(number) for number in range(SHARD_COUNT))


def mark_beside(key: str) -> str:
    """The mark of the shard that `key` belongs to."""
    return SHARDS[int(key.partition("{v")[2][:3])].mark


def shard_of(account_id: str) -> int:
    """The shard that a new account is given (then stored): crc32 of its id."""
    return crc32(account_id.encode()) % SHARD_COUNT
