"""The lookup path of an API key: process cache (30 s), Redis record, and Postgres only when Redis lacks the record.

Must not: import SQLAlchemy (data workers import this), keep a key's text or secret, or touch a store before the
checksum was right. Every answer after that costs one digest comparison, also for an id that nobody has.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from accounts.keys import KeysUnavailable, PresentedKey, RevokedKey, UnknownKey, mac_of, parse
from accounts.preferences import RoutingPreferences
from storage.redis_client import RedisError, RedisReplyError
from storage.redis_open import Listening, Redis

log = logging.getLogger(__name__)

CHANNEL = "tollgate:keys"
"""Pub/sub channel: each message is the id of a key whose cached record must go, or `*` for all."""
PEPPER_KEY = "auth:pepper"
"""Redis key with the fingerprint of the pepper in use; no key id has its length."""
TTL_S = 30.0
ENTRIES_MAX = 10_000
LOOKUPS_MAX = 32
"""Postgres lookups at once: ids can be invented, so their number must not follow the clients'."""

_NOBODY = secrets.token_bytes(32)
_EVERYBODY = b"*"


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What Redis keeps of a key, as JSON under `auth:<id>`: no secret, only its HMAC. A limit of None means none;
    `routing` is what the account says about providers, narrowed by the key."""

    id: str
    mac: bytes
    pepper: str
    account: str
    shard: int
    name: str
    requests_per_minute: int | None = None
    parallel_sessions: int | None = None
    revoked: bool = False
    routing: RoutingPreferences | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling: the key, the account that pays, the key's limits, and which providers may answer (None: none
    said)."""

    key_id: str
    account_id: str
    shard: int
    requests_per_minute: int | None
    parallel_sessions: int | None
    name: str
    preferences: RoutingPreferences | None = None


Lookup = Callable[[str], Awaitable[KeyRecord | None]]
"""Asks Postgres for a key id. Raises KeysUnavailable when it cannot be asked."""

_decode = msgspec.json.Decoder(KeyRecord).decode
encode_record = msgspec.json.Encoder().encode


def record_key(key_id: str) -> str:
    """The Redis key of a key's record."""
    return f"auth:{key_id}"


def decode_record(raw: bytes) -> KeyRecord:
    """Read a stored record. Raises KeysUnavailable when it is damaged: neither yes nor no can be answered from it."""
    try:
        return _decode(raw)
    except msgspec.DecodeError:
        log.error("a key record in Redis is not readable")
        raise KeysUnavailable from None


class KeyStore:
    """Checks presented keys. One per process; call `start` after the Redis client's."""

    def __init__(
        self,
        redis: Redis,
        lookup_in_postgres: Lookup | None,
        pepper: bytes,
        pepper_fingerprint: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        entries_max: int = ENTRIES_MAX,
    ) -> None:
        self._redis = redis
        self._lookup = lookup_in_postgres
        self._lookups = 0
        self._pepper = pepper
        self._fingerprint = pepper_fingerprint
        self._clock = clock
        self._entries_max = entries_max
        self._salt = secrets.token_bytes(16)
        self._cache: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()
        self._digests: dict[str, bytes] = {}  # key id -> its entry in the cache
        self._purges = 0
        self._subscription: Listening | None = None

    async def start(self) -> None:
        """Listen for revocations and changed preferences."""
        self._subscription = await self._redis.subscribe(CHANNEL, self.purge, lambda: self.purge(_EVERYBODY))

    async def aclose(self) -> None:
        """Stop listening; the Redis client is the caller's."""
        if self._subscription is not None:
            await self._subscription.aclose()

    @property
    def listening(self) -> bool:
        """Whether a revocation published now arrives here at once (else within the TTL)."""
        return self._subscription is not None and self._subscription.active

    def peek(self, header: bytes) -> Principal | None:
        """The principal of a key that was checked within the last 30 s, at once; None: call `authenticate`."""
        if header[:7] != b"Bearer " and header[:7].lower() != b"bearer ":
            return None
        digest = self._digest(header[7:])
        entry = self._cache.get(digest)
        if entry is None:
            return None
        if entry[0] <= self._clock():
            self._forget(digest, entry[1].key_id)
            return None
        self._cache.move_to_end(digest)
        return entry[1]

    async def authenticate(self, header: bytes) -> Principal:
        """Check an Authorization header's value.

        Raises MissingKey or MalformedKey (no store was touched), UnknownKey, RevokedKey, or KeysUnavailable when the
        stores that would know cannot be asked.
        """
        cached = self.peek(header)
        if cached is not None:
            return cached
        presented = parse(header)
        purges = self._purges
        record = await self._record(presented.id)
        self._verify(presented, record)
        assert record is not None
        principal = Principal(
            key_id=record.id,
            account_id=record.account,
            shard=record.shard,
            requests_per_minute=record.requests_per_minute,
            parallel_sessions=record.parallel_sessions,
            name=record.name,
            preferences=record.routing,
        )
        if purges == self._purges:  # else this very record may be what a revocation has just purged
            self._remember(self._digest(presented.text), principal)
        return principal

    def _verify(self, presented: PresentedKey, record: KeyRecord | None) -> None:
        """One comparison whether the id exists or not, so that time tells nothing."""
        known = record is not None and record.pepper == self._fingerprint
        expected = record.mac if record is not None and known else _NOBODY
        same = hmac.compare_digest(mac_of(self._pepper, presented.secret), expected)
        if record is None or not known or not same:
            raise UnknownKey
        if record.revoked:
            raise RevokedKey

    async def _record(self, key_id: str) -> KeyRecord | None:
        try:
            raw = await self._redis.call("GET", record_key(key_id))
        except RedisError:
            raise KeysUnavailable from None
        if raw is not None:
            return decode_record(raw)
        if self._lookup is None:
            return None
        return await self._from_postgres(key_id, self._lookup)

    async def _from_postgres(self, key_id: str, lookup: Lookup) -> KeyRecord | None:
        if self._lookups >= LOOKUPS_MAX:
            raise KeysUnavailable
        self._lookups += 1
        try:
            record = await lookup(key_id)
        finally:
            self._lookups -= 1
        if record is None:
            return None
        try:  # NX: a revocation may have written its mark meanwhile, and GET then answers it
            newer = await self._redis.call("SET", record_key(key_id), encode_record(record), "NX", "GET")
        except RedisReplyError as error:
            log.warning("a key record was not written back: %s", error.code)
            return record
        except RedisError:
            raise KeysUnavailable from None
        return record if newer is None else decode_record(newer)

    def purge(self, message: bytes) -> None:
        """Forget one key id, or with `*` all."""
        self._purges += 1
        if message == _EVERYBODY:
            self._cache.clear()
            self._digests.clear()
            return
        key_id = message.decode(errors="replace")
        digest = self._digests.get(key_id)
        if digest is not None:
            self._forget(digest, key_id)

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, digest_size=16, key=self._salt).digest()

    def _remember(self, digest: bytes, principal: Principal) -> None:
        if len(self._cache) >= self._entries_max:
            _, (_, oldest) = self._cache.popitem(last=False)
            self._digests.pop(oldest.key_id, None)
        self._cache[digest] = (self._clock() + TTL_S, principal)
        self._digests[principal.key_id] = digest

    def _forget(self, digest: bytes, key_id: str) -> None:
        del self._cache[digest]
        self._digests.pop(key_id, None)
