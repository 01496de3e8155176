"""Another issuer's public keys (a JWK set, RFC 7517): fetched from a configured address, kept, and read again when due.

Must not: fetch what a token names, follow a redirect, use the environment's proxies, take a symmetric or a private key,
or let one key verify with more than one algorithm.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Sequence
from typing import Any

import httpx2
import jwt
import msgspec

from accounts.jws import (
    KID_CHARS_MAX,
    Algorithm,
    TokenRefused,
    TokensUnavailable,
    UnknownTokenKey,
    VerifyingKey,
    strict_object,
)
from accounts.reloading import Reloading
from config.issuers import PublicAlgorithm

log = logging.getLogger(__name__)

DOCUMENT_BYTES_MAX = 256 * 1024
KEYS_MAX = 64
FETCH_S_MAX = 5.0
FRESH_S = 300.0
"""Older sets are read again beside the requests that still use them; twice as old ones before anything uses them."""
STALE_TIMES = 12
"""A set that could not be read again for so many times as long is not used any more: one hour."""
REST_S = 10.0
"""Seconds between two fetches that invented key ids, or failures, can cause."""

_RSA_CHARS = range(342, 1_367)
"""Base64url of a modulus of 2,048 to 8,192 bits; verifying with a larger one is work that others choose."""
_EXPONENT_CHARS_MAX = 6
_FITS: dict[Algorithm, tuple[str, str | None]] = {
    "RS256": ("RSA", None),
    "RS384": ("RSA", None),
    "RS512": ("RSA", None),
    "PS256": ("RSA", None),
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "EdDSA": ("OKP", "Ed25519"),
}
"""Which type of key, on which curve, an algorithm is for."""


class _Jwk(msgspec.Struct):
    """The members that we read. `d` and `k` are there to be refused: they are secrets."""

    kty: str
    kid: str | None = None
    alg: str | None = None
    use: str | None = None
    key_ops: list[str] | None = None
    crv: str | None = None
    x: str | None = None
    y: str | None = None
    n: str | None = None
    e: str | None = None
    d: str | None = None
    k: str | None = None


def read_set(document: bytes, algorithms: Sequence[PublicAlgorithm]) -> list[VerifyingKey]:
    """The keys of a JWK set that verify signatures with one of `algorithms`; others are passed over.

    Two keys of one name are both passed over: which is meant cannot be told. Raises ValueError for what is no such set.
    """
    try:
        listed = strict_object(document).get("keys")
    except TokenRefused as refused:
        raise ValueError(str(refused)) from None
    if not isinstance(listed, list) or len(listed) > KEYS_MAX:
        raise ValueError(f"no list of at most {KEYS_MAX} keys")
    keys = [key for item in listed if (key := _key(item, algorithms)) is not None]
    kids = [key.kid for key in keys]
    return [key for key in keys if kids.count(key.kid) == 1]


def _key(item: Any, algorithms: Sequence[PublicAlgorithm]) -> VerifyingKey | None:
    try:
        jwk = msgspec.convert(item, _Jwk)
    except msgspec.ValidationError:
        return None
    algorithm = _pinned(jwk, algorithms)
    if algorithm is None or not _usable(jwk):
        return None
    members = {name: value for name in ("kty", "crv", "x", "y", "n", "e") if (value := getattr(jwk, name)) is not None}
    try:
        return VerifyingKey(jwk.kid, algorithm, jwt.PyJWK(members, algorithm=algorithm).key)
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        log.warning("a key of a JWK set is not usable: %s", type(error).__name__)
        return None


def _pinned(jwk: _Jwk, algorithms: Sequence[PublicAlgorithm]) -> Algorithm | None:
    """The one algorithm of a key: its own `alg` where it is taken and fits, without one the first that fits."""
    for algorithm in algorithms:
        kty, curve = _FITS[algorithm]
        if jwk.kty == kty and jwk.crv == curve and jwk.alg in (None, algorithm):
            return algorithm
    return None


def _usable(jwk: _Jwk) -> bool:
    if jwk.d is not None or jwk.k is not None or jwk.use not in (None, "sig"):
        return False
    if jwk.key_ops is not None and "verify" not in jwk.key_ops:
        return False
    if jwk.kid is not None and not 1 <= len(jwk.kid) <= KID_CHARS_MAX:
        return False
    return jwk.kty != "RSA" or (len(jwk.n or "") in _RSA_CHARS and len(jwk.e or "") <= _EXPONENT_CHARS_MAX)


class FetchedKeys:
    """The keys at one configured address. `trust` is the TLS context of the fetch (None: the system's),
    `fetch_s` how many seconds it may take in all,
    `fresh_s` for how many a set is good."""

    def __init__(
        self,
        url: str,
        algorithms: Sequence[PublicAlgorithm],
        trust: ssl.SSLContext | None = None,
        *,
        fetch_s: float = FETCH_S_MAX,
        fresh_s: float = FRESH_S,
    ) -> None:
        self._url, self._algorithms, self._fetch_s = url, algorithms, fetch_s
        self._trust = trust if trust is not None else ssl.create_default_context()
        self._keys: list[VerifyingKey] = []
        self._reloading = Reloading(self._fetch, rest_s=REST_S, fresh_s=fresh_s)
        self._stale_s = STALE_TIMES * fresh_s

    async def key(self, kid: str | None) -> VerifyingKey:
        """The key of that name; the only key for a token that names none. Raises UnknownTokenKey, TokensUnavailable."""
        await self._reloading.freshen()
        if self._reloading.age_s > self._stale_s:
            raise TokensUnavailable
        found = self._found(kid)
        if found is None and await self._reloading.again(stranger=True):
            found = self._found(kid)
        if found is None:
            raise UnknownTokenKey("kid")
        return found

    def _found(self, kid: str | None) -> VerifyingKey | None:
        if kid is None:
            return self._keys[0] if len(self._keys) == 1 else None
        return next((key for key in self._keys if key.kid == kid), None)

    async def _fetch(self) -> bool:
        try:
            async with asyncio.timeout(self._fetch_s):
                self._keys = read_set(await self._document(), self._algorithms)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, TimeoutError, ValueError) as error:
            log.warning("a JWK set could not be read: %s", type(error).__name__)
            return False
        if not self._keys:
            log.warning("a JWK set has no key that is usable here")
        return True

    async def _document(self) -> bytes:
        """The document's bytes. Raises ValueError for another status than 200 and for more bytes than are taken."""
        bounds = httpx2.Timeout(self._fetch_s)
        asking = {"accept": "application/jwk-set+json, application/json", "accept-encoding": "identity"}
        async with (
            httpx2.AsyncClient(verify=self._trust, timeout=bounds, trust_env=False, follow_redirects=False) as client,
            client.stream("GET", self._url, headers=asking) as answer,
        ):
            if answer.status_code != httpx2.codes.OK:
                raise ValueError(f"status {answer.status_code}")
            taken = bytearray()
            async for part in answer.aiter_raw():
                taken += part
                if len(taken) > DOCUMENT_BYTES_MAX:
                    raise ValueError("too large")
            return bytes(taken)

    async def aclose(self) -> None:
        """Give up a fetch that is under way."""
        await self._reloading.aclose()
