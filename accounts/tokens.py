"""Tollgate's own access tokens: JWTs (RFC 9068) of at most 15 minutes, signed with ES256 by a rotating key.

Must not: touch a store, sign with anything but the ring's key, or decide whether a `token_version` is still the user's.
ES256 and not EdDSA, because every JWT library, FIPS module and browser verifies it, the name `EdDSA` is on its way out
(RFC 9864), and P-256 is the faster of the two in OpenSSL.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from jwt.algorithms import ECAlgorithm

from accounts import jws
from accounts.jws import Algorithm, TokenRefused, TokensUnavailable, UnknownTokenKey, VerifyingKey
from config.issuers import Role

ALGORITHM: Algorithm = "ES256"
TYPE = "at+jwt"
LIFETIME_S_MAX = 900
SUBJECT_CHARS_MAX = 255

_HEADERS = {"alg", "kid", "typ"}
Clock = Callable[[], float]
"""Seconds of Unix time."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a token is made for. `id` is the user's; a token of another `token_version` than the user's is no longer
    good, which whoever verifies it must ask."""

    id: str
    username: str
    email: str
    role: Role
    token_version: int


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """What a verified token says. Times are seconds of Unix time."""

    sub: str
    username: str
    email: str
    role: Role
    iss: str
    aud: str
    exp: int
    iat: int
    jti: str
    token_version: int


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key pair. It signs from `signs_from` until a younger one does, and verifies before `not_after` (None: no end
    yet); both in seconds of Unix time."""

    kid: str
    private: EllipticCurvePrivateKey = field(repr=False)
    signs_from: float
    not_after: float | None = None

    def in_force(self, now: float) -> bool:
        """Whether what it has signed is accepted."""
        return self.not_after is None or now < self.not_after


class KeyRing:
    """The signing keys as they were read at one moment."""

    def __init__(self, keys: tuple[SigningKey, ...]) -> None:
        self._keys = keys
        self._verifying = {key.kid: VerifyingKey(key.kid, ALGORITHM, key.private.public_key()) for key in keys}

    def signer(self, now: float) -> SigningKey | None:
        """The youngest key whose time has come; before any has, the next one. None: no key is in force."""
        alive = [key for key in self._keys if key.in_force(now)]
        begun = [key for key in alive if key.signs_from <= now]
        if begun:
            return max(begun, key=lambda key: key.signs_from)
        return min(alive, key=lambda key: key.signs_from, default=None)

    def verifying(self, kid: str | None, now: float) -> VerifyingKey | None:
        """The public key of that name, if it is in force."""
        if any(key.kid == kid and key.in_force(now) for key in self._keys):
            return self._verifying[str(kid)]
        return None

    def document(self, now: float) -> dict[str, list[dict[str, str]]]:
        """The JWK set (RFC 7517) of the public keys in force, those included that will sign soon."""
        return {"keys": [_public_jwk(key) for key in self._keys if key.in_force(now)]}


class Tokens:
    """Makes and verifies access tokens with `ring`, which whoever reads keys replaces.

    `issuer` and `audience` are what both sides must say; `lifetime_s` is at most 900.
    """

    def __init__(
        self, issuer: str, audience: str, *, lifetime_s: int = LIFETIME_S_MAX, clock: Clock = time.time
    ) -> None:
        if not (issuer and audience) or not 1 <= lifetime_s <= LIFETIME_S_MAX:
            raise ValueError(f"access tokens need an issuer, an audience and a life of 1 to {LIFETIME_S_MAX} s")
        self.issuer, self.audience, self.lifetime_s, self.clock = issuer, audience, lifetime_s, clock
        self.ring = KeyRing(())

    def issue(self, who: Identity) -> str:
        """A new token. Raises TokensUnavailable when no key is there to sign it."""
        now = self.clock()
        signer = self.ring.signer(now)
        if signer is None:
            raise TokensUnavailable
        claims: Mapping[str, Any] = {
            "sub": who.id,
            "username": who.username,
            "email": who.email,
            "role": who.role,
            "iss": self.issuer,
            "aud": self.audience,
            "exp": int(now) + self.lifetime_s,
            "iat": int(now),
            "jti": secrets.token_urlsafe(16),
            "token_version": who.token_version,
        }
        return jws.sign(claims, {"typ": TYPE, "kid": signer.kid}, ALGORITHM, signer.private)

    def verify(self, text: str) -> Claims:
        """What a token of ours says. Raises UnknownTokenKey (its key may be new: read the keys and ask again),
        ExpiredToken, TokenRefused."""
        token, now = jws.read(text), self.clock()
        if set(token.header) != _HEADERS or token.header["typ"] != TYPE:
            raise TokenRefused("not the header of our access tokens")
        key = self.ring.verifying(token.kid, now)
        if key is None:
            raise UnknownTokenKey("kid")
        proven = jws.proven(token, key)
        try:
            claims = msgspec.convert(proven, Claims)
        except msgspec.ValidationError:
            raise TokenRefused("a claim is missing or of another type") from None
        self._check(claims, proven, now)
        return claims

    def _check(self, claims: Claims, proven: Mapping[str, Any], now: float) -> None:
        jws.check_times(proven, now)
        jws.text_claim(proven, "sub", SUBJECT_CHARS_MAX)
        if claims.iss != self.issuer:
            raise TokenRefused("iss")
        if claims.aud != self.audience:
            raise TokenRefused("aud")
        if not 0 < claims.exp - claims.iat <= LIFETIME_S_MAX:
            raise TokenRefused("lives longer than our tokens do")

    def document(self) -> dict[str, list[dict[str, str]]]:
        """The JWK set that other services verify our tokens with."""
        return self.ring.document(self.clock())


def looks_own(text: str, issuer: str) -> bool:
    """Whether a token says that it is of `issuer`: what chooses between our keys and other issuers'. Proves nothing.

    Raises TokenRefused.
    """
    return jws.read(text).claims.get("iss") == issuer


def _public_jwk(key: SigningKey) -> dict[str, str]:
    public = {name: str(value) for name, value in ECAlgorithm.to_jwk(key.private.public_key(), as_dict=True).items()}
    return {**public, "kid": key.kid, "use": "sig", "alg": ALGORITHM}
