"""The keys that sign access tokens: made and rotated in Postgres, sealed with the gateway's secret, read by workers.

Must not: import SQLAlchemy (data workers read keys), write a private key unsealed, or trust a row that the secret does
not open: whoever can only write to the database can add no key and change none.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)

from accounts.jws import LEEWAY_S, TokensUnavailable, UnknownTokenKey
from accounts.reloading import Reloading
from accounts.tokens import LIFETIME_S_MAX, Claims, Identity, KeyRing, SigningKey, Tokens
from storage.database import FAILED, Connection, Pool

log = logging.getLogger(__name__)

ANNOUNCE_S = 120.0
"""A new key is published for so long before it signs: longer than FRESH_S, so that every worker knows it by then."""
OUTLIVES_S = LIFETIME_S_MAX + 2 * LEEWAY_S
"""A key verifies for so long after its successor began to sign: a token's longest life, and the clocks' leeways."""
KEEP_S = 30 * 86_400.0
"""Rows are deleted so long after their end."""
KEYS_MAX = 16
"""Keys in force at once. Rotating more often than tokens die is refused."""
FRESH_S = 30.0
"""A worker reads the keys again when its own are older, and at twice that waits for it: while Postgres answers, a
retired key is refused everywhere after this time."""
REST_S = 5.0
"""Seconds between two readings that invented key ids, or failures, can cause."""
QUERY_S_MAX = 2.0
LOCK_KEY = 0x746F6C6C6B657973
"""Advisory lock, "tollkeys": one change of the keys at a time."""

_NONCE_BYTES = 12
_SEALED_FOR = b"tollgate signing key v1"
_READ = """
SELECT kid, public, sealed, extract(epoch FROM signs_from)::float8 AS signs_from,
       extract(epoch FROM not_after)::float8 AS not_after
  FROM signing_key WHERE not_after IS NULL OR not_after > $1 ORDER BY signs_from DESC LIMIT $2
"""
_INSERT = "INSERT INTO signing_key (kid, public, sealed, created_at, signs_from) VALUES ($1, $2, $3, $4, $5)"
_END_OTHERS = "UPDATE signing_key SET not_after = $2 WHERE kid <> $1 AND (not_after IS NULL OR not_after > $2)"
_RETIRE = "UPDATE signing_key SET not_after = $2 WHERE kid = $1 AND (not_after IS NULL OR not_after > $2)"
_FORGET = "DELETE FROM signing_key WHERE not_after < $1"


class TooManyKeys(Exception):
    """The signing keys were rotated too often. Wait until tokens of the oldest have ended, or retire a key."""


@dataclass(frozen=True, slots=True)
class Rotated:
    """A new key, and when it begins to sign (seconds of Unix time)."""

    kid: str
    signs_from: float


async def ensure(pool: Pool, secret: bytes, now: float) -> Rotated | None:
    """Make the first key where none is in force that `secret` opens. None: there is one. Raises FAILED.

    Safe to call from several processes at once.
    """
    async with _turn(pool) as connection:
        if await _read(connection, secret, now):
            return None
        return await _insert(connection, secret, now, now)


async def rotate(
    pool: Pool, secret: bytes, now: float, *, older_than_s: float | None = None, announce_s: float = ANNOUNCE_S
) -> Rotated | None:
    """Make a key that begins to sign in `announce_s` seconds, and let the others verify until their tokens have ended.

    None: the youngest key is not yet `older_than_s` old, so that any number of processes may ask again and again.
    Raises TooManyKeys, FAILED of storage.database. `now` is Unix time.
    """
    async with _turn(pool) as connection:
        known = await _read(connection, secret, now)
        youngest = max((key.signs_from for key in known), default=float("-inf"))
        if older_than_s is not None and now - youngest < older_than_s:
            return None
        if len(known) >= KEYS_MAX:
            raise TooManyKeys(TooManyKeys.__doc__)
        signs_from = max(now + announce_s, youngest + 0.001) if known else now
        made = await _insert(connection, secret, now, signs_from)
        await connection.execute(_END_OTHERS, made.kid, _time(signs_from + OUTLIVES_S))
        await connection.execute(_FORGET, _time(now - KEEP_S))
        return made


async def retire(pool: Pool, secret: bytes, kid: str, now: float) -> bool:
    """End a key at once, with every token that it signed; where it was the last, make another in its place.

    False: there is no such key in force. Workers follow within 2 * FRESH_S. Raises FAILED.
    """
    async with _turn(pool) as connection:
        if await connection.execute(_RETIRE, kid, _time(now)) == "UPDATE 0":
            return False
        if not await _read(connection, secret, now):
            await _insert(connection, secret, now, now)
        return True


async def read_ring(pool: Pool | Connection, secret: bytes, now: float) -> KeyRing:
    """The keys in force. Raises FAILED."""
    return KeyRing(tuple(await _read(pool, secret, now)))


class SigningKeys:
    """Keeps the ring of a process's `tokens` at what Postgres says, and asks again for a key that it does not know."""

    def __init__(self, pool: Pool, secret: bytes, tokens: Tokens, *, fresh_s: float = FRESH_S) -> None:
        self.tokens = tokens
        self._pool, self._secret = pool, secret
        self._loaded = False
        self._reloading = Reloading(self._load, rest_s=REST_S, fresh_s=fresh_s)

    async def issue(self, who: Identity) -> str:
        """A new token. Raises TokensUnavailable."""
        await self._ready()
        return self.tokens.issue(who)

    async def verify(self, text: str) -> Claims:
        """What a token of ours says. Raises TokenRefused, ExpiredToken, TokensUnavailable."""
        await self._ready()
        try:
            return self.tokens.verify(text)
        except UnknownTokenKey:
            if not await self._reloading.again(stranger=True):
                raise
        return self.tokens.verify(text)

    async def document(self) -> dict[str, list[dict[str, str]]]:
        """The JWK set of the keys in force. Raises TokensUnavailable."""
        await self._ready()
        return self.tokens.document()

    async def _ready(self) -> None:
        await self._reloading.freshen()
        if not self._loaded:
            raise TokensUnavailable

    async def _load(self) -> bool:
        try:
            rows = await self._pool.fetch(_READ, *_limits(self.tokens.clock()), timeout=QUERY_S_MAX)
        except FAILED as error:
            log.warning("the signing keys could not be read: %s", type(error).__name__)
            return False
        self.tokens.ring = KeyRing(tuple(_opened(rows, self._secret)))
        self._loaded = True
        return True

    async def aclose(self) -> None:
        """Give up a reading that is under way. The pool is its owner's."""
        await self._reloading.aclose()


@asynccontextmanager
async def _turn(pool: Pool) -> AsyncIterator[Connection]:
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK_KEY)
        yield connection


async def _read(source: Pool | Connection, secret: bytes, now: float) -> list[SigningKey]:
    rows = await source.fetch(_READ, *_limits(now))
    keys = _opened(rows, secret)
    if len(keys) < len(rows):
        log.warning("%d signing keys are not of this gateway's secret, and are not used", len(rows) - len(keys))
    return keys


def _limits(now: float) -> tuple[datetime, int]:
    return _time(now), 4 * KEYS_MAX  # some rows may be of another secret


def _opened(rows: list[Any], secret: bytes) -> list[SigningKey]:
    return [key for row in rows if (key := _open(row, secret)) is not None]


def _open(row: Any, secret: bytes) -> SigningKey | None:
    sealed: bytes = row["sealed"]
    try:
        plain = _cipher(secret).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _bound(row["kid"], row["public"]))
    except (InvalidTag, ValueError):
        return None
    private = load_der_private_key(plain, password=None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    return SigningKey(row["kid"], private, row["signs_from"], row["not_after"])


async def _insert(connection: Connection, secret: bytes, now: float, signs_from: float) -> Rotated:
    private, kid = ec.generate_private_key(ec.SECP256R1()), secrets.token_urlsafe(12)
    public = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    plain = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sealed = nonce + _cipher(secret).encrypt(nonce, plain, _bound(kid, public))
    await connection.execute(_INSERT, kid, public, sealed, _time(now), _time(signs_from))
    return Rotated(kid, signs_from)


def _cipher(secret: bytes) -> AESGCM:
    """AES-256-GCM with a key of its own (HKDF-SHA256, RFC 5869), so that no other use of the secret tells of it."""
    return AESGCM(HKDF(algorithm=SHA256(), length=32, salt=None, info=_SEALED_FOR).derive(secret))


def _bound(kid: str, public: bytes) -> bytes:
    return kid.encode() + b"\0" + public


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
