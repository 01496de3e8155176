"""Tokens that others sign: whose they are, whether they hold, and who they say is calling.

Must not: know our own keys, make a user, believe a role that `role_map` does not give, or let one issuer's key speak
for another.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from accounts import jws
from accounts.jwks import FetchedKeys
from accounts.jws import TokenRefused, VerifyingKey
from config.issuers import ROLES, Issuer, Role, read_secret

SUBJECT_CHARS_MAX = 255
NAME_CHARS_MAX = 320
ROLES_MAX = 64
"""Roles of one token that are looked at; who has more gets none."""


@dataclass(frozen=True, slots=True)
class ExternalIdentity:
    """Who an accepted token is about. `issuer` is the configured table's name: only with it a `subject` is one person.

    An email proves nothing about a user of another issuer, unless `email_verified` and whoever links them says so.
    """

    issuer: str
    subject: str
    username: str | None
    email: str | None
    email_verified: bool
    role: Role
    expires_at: float


class _Accepted:
    """One configured issuer and its keys."""

    def __init__(self, name: str, rules: Issuer, secret: bytes | None, trust: ssl.SSLContext | None) -> None:
        self.name, self.rules = name, rules
        self._shared = VerifyingKey(None, "HS256", secret) if secret is not None else None
        self.fetched = FetchedKeys(rules.jwks_url, rules.algorithms, trust) if rules.jwks_url else None

    async def key(self, kid: str | None) -> VerifyingKey:
        """The key for a token that names `kid`; a shared secret has no name. Raises as FetchedKeys.key."""
        if self._shared is not None:
            return self._shared
        assert self.fetched is not None  # config.issuers.check: either a secret or an address
        return await self.fetched.key(kid)


class ExternalIssuers:
    """All configured issuers. `environ` holds the shared secrets, `trust` is the TLS context for fetching keys (None:
    the system's), `clock` gives Unix time. Raises ValueError when a secret is missing."""

    def __init__(
        self,
        issuers: Mapping[str, Issuer],
        environ: Mapping[str, str],
        *,
        trust: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._by_iss: dict[str | None, _Accepted] = {
            rules.issuer: _Accepted(name, rules, read_secret(rules, environ), trust) for name, rules in issuers.items()
        }

    async def verify(self, text: str) -> ExternalIdentity:
        """Who the token is about. Raises TokenRefused, ExpiredToken, TokensUnavailable (the keys cannot be had)."""
        token = jws.read(text)
        named = token.claims.get("iss")  # unproven until the keys that it chooses, and no others, say so
        accepted = self._by_iss.get(named if isinstance(named, str) else None) or self._by_iss.get(None)
        if accepted is None:
            raise TokenRefused("iss")
        claims = jws.proven(token, await accepted.key(token.kid))
        _check(accepted.rules, token.header, claims, self._clock())
        return _identity(accepted.name, accepted.rules, claims)

    async def aclose(self) -> None:
        """Give up fetches that are under way."""
        for accepted in self._by_iss.values():
            if accepted.fetched is not None:
                await accepted.fetched.aclose()


def _check(rules: Issuer, header: Mapping[str, Any], claims: Mapping[str, Any], now: float) -> None:
    if rules.typ is not None and _type(header.get("typ")) != _type(rules.typ):
        raise TokenRefused("typ")
    if rules.audience:
        given = claims.get("aud")
        if not any(name in rules.audience for name in (given if isinstance(given, list) else [given])):
            raise TokenRefused("aud")
    jws.check_times(claims, now, rules.max_age_s)


def _type(typ: object) -> str | None:
    """A media type as RFC 7515, 4.1.9 compares it: without case, `application/` left out."""
    return typ.lower().removeprefix("application/") if isinstance(typ, str) else None


def _identity(name: str, rules: Issuer, claims: Mapping[str, Any]) -> ExternalIdentity:
    return ExternalIdentity(
        issuer=name,
        subject=jws.text_claim(claims, "sub", SUBJECT_CHARS_MAX),
        username=_optional(claims, rules.username_claim),
        email=_optional(claims, rules.email_claim),
        email_verified=claims.get("email_verified") is True,
        role=_role(rules, claims.get(rules.role_claim)),
        expires_at=jws.seconds(claims, "exp"),
    )


def _optional(claims: Mapping[str, Any], name: str) -> str | None:
    return None if claims.get(name) is None else jws.text_claim(claims, name, NAME_CHARS_MAX)


def _role(rules: Issuer, given: object) -> Role:
    """The highest role that the map gives for what the token names; `admin` counts only where roles are trusted."""
    names = given if isinstance(given, list) else [given]
    if len(names) > ROLES_MAX:
        return "user"
    mapped = {rules.role_map[name] for name in names if isinstance(name, str) and name in rules.role_map}
    if not rules.trust_roles:
        mapped.discard("admin")
    return max(mapped, key=ROLES.index, default="user")
