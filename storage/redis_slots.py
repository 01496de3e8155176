"""Which slot of a Redis Cluster a command belongs to, and what a cluster says about who has which slot.

Must not: do I/O, or guess: a command that asks one server is refused, a reply that cannot be read is a ValueError.
"""

from __future__ import annotations

from binascii import crc_hqx
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from storage.redis_connection import RedisReplyError, Word

SLOTS = 16_384

_SCRIPTED = frozenset({"EVALSHA", "EVAL", "EVALSHA_RO", "EVAL_RO"})
_STREAMS = frozenset({"XREAD", "XREADGROUP"})
_ANYWHERE = frozenset({"PING", "ECHO", "TIME", "PUBLISH", "SCRIPT", "INFO"})
_ONE_SERVER_NAMES = """
ACL ASKING AUTH BITOP CLIENT CLUSTER COMMAND CONFIG DBSIZE DEBUG EXEC FAILOVER FLUSHALL FLUSHDB FUNCTION HELLO
KEYS LATENCY MEMORY MIGRATE MODULE MONITOR MULTI OBJECT PSUBSCRIBE PUBSUB RANDOMKEY READONLY READWRITE REPLICAOF RESET
ROLE SCAN SELECT SHUTDOWN SLOWLOG SSUBSCRIBE SUBSCRIBE SWAPDB WAIT WAITAOF WATCH XGROUP XINFO
"""
_OF_ONE_SERVER = frozenset(_ONE_SERVER_NAMES.split())


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server of the cluster listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


Range = tuple[int, int, Place]
"""First slot, last slot, and the primary that has them."""


@lru_cache(maxsize=4_096)
def _slot_of_tag(tag: str) -> int:
    return crc_hqx(tag.encode(), 0) % SLOTS


def slot_of(key: Word) -> int:
    """The slot of a key: CRC16 (XMODEM) of its hash tag, or of the whole key where it has none; see "Hash tags" in the
    Redis Cluster specification."""
    if isinstance(key, str):
        start = key.find("{")
        if start >= 0 and (end := key.find("}", start + 1)) > start + 1:
            return _slot_of_tag(key[start + 1 : end])
        return crc_hqx(key.encode(), 0) % SLOTS
    data = key if isinstance(key, bytes) else b"%d" % key
    start = data.find(b"{")
    if start >= 0 and (end := data.find(b"}", start + 1)) > start + 1:
        data = data[start + 1 : end]
    return crc_hqx(data, 0) % SLOTS


def key_of(words: tuple[Word, ...]) -> Word | None:
    """The key that says where a command runs; None where any server can answer it.

    It is the first of a script's keys, the first of the streams, else the first argument. Raises ValueError for a
    command that means one server (CONFIG, SCAN, ...), or whose key stands elsewhere.
    """
    name = words[0]
    if name != "EVALSHA":
        name = name.upper() if isinstance(name, str) else str(name)
        if name in _ANYWHERE:
            return None
        if name in _STREAMS:
            return words[words.index("STREAMS") + 1]
        if name in _OF_ONE_SERVER or len(words) == 1:
            raise ValueError(f"{name} is for one server, and this is a cluster: ask each")
        if name not in _SCRIPTED:
            return words[1]
    return words[3] if int(words[2]) else None


def read_slots(reply: Any, asked: str) -> list[Range]:
    """CLUSTER SLOTS: first slot, last slot and primary of each range. A server that does not tell its host has the host
    `asked`. Raises ValueError for anything else than such a reply."""
    try:
        ranges = [(int(first), int(last), _place(main[0], main[1], asked)) for first, last, main, *_ in reply]
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"CLUSTER SLOTS: {error}") from None
    if not all(0 <= first <= last < SLOTS for first, last, _ in ranges):
        raise ValueError("CLUSTER SLOTS: a range outside 0..16383")
    return ranges


def read_redirect(error: RedisReplyError, asked: str) -> Place:
    """Where `MOVED <slot> <host>:<port>` and `ASK` point. Raises ValueError."""
    words = str(error).split(" ")
    if len(words) != 3:
        raise ValueError(f"not a redirection: {error}")
    host, _, port = words[2].rpartition(":")
    return _place(host.encode(), port, asked)


def _place(host: bytes | None, port: int | str, asked: str) -> Place:
    """`?` is a server whose host name is not set: the host that was asked is then as good a guess as the server's own
    documents allow for an empty name."""
    name = host.decode("ascii", "replace").strip("[]") if host else ""
    number = int(port)
    if not 0 < number < 65_536:
        raise ValueError(f"{number} is no port")
    return Place(name if name and name != "?" else asked, number)
