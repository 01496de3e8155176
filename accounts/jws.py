"""Signed tokens (RFC 7515, compact form) read strictly, and verified with the one algorithm of the key at hand.

Must not: take a key or an algorithm from a token, read a clock or a store, or put a token's text into an error.
Follows RFC 8725; the header's `alg` is only ever compared with what the key is for.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jwt

TOKEN_CHARS_MAX = 8 * 1024
"""Characters of a token: more than any header line carries on its way, so a longer one was made to be costly."""
KID_CHARS_MAX = 255
LEEWAY_S = 30
"""By how many seconds two machines' clocks may differ."""

Algorithm = Literal["HS256", "RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"]

_REFUSED_HEADERS = frozenset(("b64", "crit", "cty", "enc", "jku", "jwk", "x5c", "x5u", "zip"))
"""What would bring a key of its own, nest another token, or change what the signature covers."""
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_SECONDS_MAX = 2**53


class TokenRefused(Exception):
    """The access token was not accepted. Sign in again."""


class ExpiredToken(TokenRefused):
    """The access token has expired. Refresh it, or sign in again."""


class UnknownTokenKey(TokenRefused):
    """The access token was not accepted: none of the keys in force has signed it. Sign in again."""


class TokensUnavailable(Exception):
    """Access tokens cannot be checked at the moment. Retry shortly."""


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A public key or a shared secret, and the one algorithm it is for."""

    kid: str | None
    algorithm: Algorithm
    material: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class Unverified:
    """A well-formed token; nothing in it is proven. `claims` may choose an issuer's keys, and nothing else."""

    text: str = field(repr=False)
    header: Mapping[str, Any]
    claims: dict[str, Any] = field(repr=False)

    @property
    def kid(self) -> str | None:
        kid: str | None = self.header.get("kid")
        return kid


def read(text: str) -> Unverified:
    """Take a token apart. Raises TokenRefused (its argument says why, for logs)."""
    if len(text) > TOKEN_CHARS_MAX:
        raise TokenRefused("too long")
    if _COMPACT.fullmatch(text) is None:
        raise TokenRefused("not three parts of base64url")
    head, payload, _ = text.split(".")
    header = strict_object(_bytes(head))
    if not _REFUSED_HEADERS.isdisjoint(header):
        raise TokenRefused("a header that is not taken")
    if "kid" in header:
        text_claim(header, "kid", KID_CHARS_MAX)
    return Unverified(text, header, strict_object(_bytes(payload)))


def proven(token: Unverified, key: VerifyingKey) -> dict[str, Any]:
    """The token's claims, once its signature is right for the key and the key's algorithm. Raises TokenRefused."""
    try:
        _VERIFIERS[key.algorithm].decode_complete(token.text, key.material, algorithms=[key.algorithm])
    except jwt.PyJWTError as error:
        raise TokenRefused(type(error).__name__) from None
    return token.claims


def sign(claims: Mapping[str, Any], headers: dict[str, Any], algorithm: Algorithm, private: Any) -> str:
    """A token with these claims and headers."""
    payload = json.dumps(claims, separators=(",", ":")).encode()
    return _VERIFIERS[algorithm].encode(payload, private, algorithm=algorithm, headers=headers)


def check_times(claims: Mapping[str, Any], now: float, max_age_s: int | None = None) -> None:
    """`exp` must be there and ahead; `nbf` and `iat`, where given, must not be; all with the leeway, in seconds of
    Unix time. With `max_age_s` an `iat` is required, not older. Raises ExpiredToken, TokenRefused."""
    if now >= seconds(claims, "exp") + LEEWAY_S:
        raise ExpiredToken("exp")
    for name in ("nbf", "iat"):
        if name in claims and seconds(claims, name) > now + LEEWAY_S:
            raise TokenRefused(f"{name} lies ahead")
    if max_age_s is not None and now >= seconds(claims, "iat") + max_age_s + LEEWAY_S:
        raise ExpiredToken("older than is taken")


def seconds(claims: Mapping[str, Any], name: str) -> float:
    """A NumericDate: a number of seconds, not negative. Raises TokenRefused."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _SECONDS_MAX:
        raise TokenRefused(f"{name} is no date")
    return value


def text_claim(claims: Mapping[str, Any], name: str, chars_max: int) -> str:
    """A text of 1 to `chars_max` characters without control characters. Raises TokenRefused."""
    value = claims.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= chars_max or _CONTROL.search(value):
        raise TokenRefused(f"{name} is no text that is taken")
    return value


def strict_object(raw: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8 whose members are all different, at every depth, without NaN and Infinity.

    Raises TokenRefused.
    """
    try:
        found = json.loads(raw.decode(), object_pairs_hook=_all_different, parse_constant=_refuse)
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise TokenRefused("not JSON as it is taken") from None
    if not isinstance(found, dict):
        raise TokenRefused("no JSON object")
    return found


def _all_different(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is there twice")
    return members


def _refuse(_word: str) -> None:
    raise ValueError("no JSON number")


def _bytes(part: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except ValueError:
        raise TokenRefused("not base64url") from None


def _only(algorithm: Algorithm) -> jwt.PyJWS:
    return jwt.PyJWS(algorithms=[algorithm], options={"verify_signature": True, "enforce_minimum_key_length": True})


_VERIFIERS: dict[Algorithm, jwt.PyJWS] = {
    name: _only(name) for name in ("HS256", "RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA")
}
