"""`[issuers.<name>]`: who else may sign tokens that this gateway accepts, with which keys, and what is believed.

Must not: read the environment by itself, fetch anything, or know the other tables of the configuration file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args
from urllib.parse import urlsplit

from config.kinds import is_loopback
from config.tables import Table, at_least

Role = Literal["user", "supervisor", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
"""From the least to the most that a role may do."""
PublicAlgorithm = Literal["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"]
SECRET_BYTES_MIN = 32
"""RFC 7518, 3.2: a key of HS256 has at least as many bits as its hash."""
ROLES_MAX = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
_PEM_OR_JWK = re.compile(r"\s*(?:-----BEGIN|\{|ssh-|ecdsa-)")


class Issuer(Table, frozen=True):
    """Either `secret_env`, the variable with a shared secret (HS256 and nothing else), or `jwks_url` (https; the keys'
    `algorithms`: a key without `alg` gets the first that fits it).

    `issuer`, `audience` (any of them), `typ` and `max_age_s` are required of a token where they are set. `role_claim`
    names one role or a list; `role_map` gives the roles here, who has none of them is a `user`. `admin` is given only
    with `trust_roles`.
    """

    secret_env: str | None = None
    jwks_url: str | None = None
    algorithms: tuple[PublicAlgorithm, ...] = ("RS256", "ES256", "EdDSA")
    issuer: str | None = None
    audience: tuple[str, ...] = ()
    typ: str | None = None
    max_age_s: int | None = None
    username_claim: str = "username"
    email_claim: str = "email"
    role_claim: str = "role"
    role_map: dict[str, Role] = {}
    trust_roles: bool = False


def check(issuer: Issuer) -> None:
    """Raises ValueError, which begins with the key at fault."""
    if (issuer.secret_env is None) == (issuer.jwks_url is None):
        raise ValueError("secret_env: an issuer has either a secret_env or a jwks_url. Set one of them.")
    if issuer.secret_env is not None and not _ENV.fullmatch(issuer.secret_env):
        raise ValueError(f"secret_env: '{issuer.secret_env[:64]}' is not the name of an environment variable.")
    if issuer.jwks_url is not None:
        _check_url(issuer.jwks_url)
    if not issuer.algorithms:
        raise ValueError("algorithms: name at least one.")
    if issuer.issuer == "" or issuer.typ == "" or "" in issuer.audience:
        raise ValueError("issuer: neither issuer, typ nor an audience may be empty. Remove the key instead.")
    at_least(issuer, ("max_age_s",), 1)
    if len(issuer.role_map) > ROLES_MAX:
        raise ValueError(f"role_map: more than {ROLES_MAX} roles.")
    for name in ("username_claim", "email_claim", "role_claim"):
        if not getattr(issuer, name):
            raise ValueError(f"{name}: a claim's name is not empty.")


def check_all(issuers: Mapping[str, Issuer]) -> None:
    """Every table, and that a token's `iss` tells which one it is for. Raises ValueError, beginning with the key."""
    seen: dict[str | None, str] = {}
    for name, issuer in issuers.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"issuers.{name[:64]}: an issuer's name is 1-64 of letters, digits, - and _.")
        try:
            check(issuer)
        except ValueError as error:
            raise ValueError(f"issuers.{name}.{error}") from None
        other = seen.setdefault(issuer.issuer, name)
        if other != name:
            raise ValueError(f"issuers.{name}.issuer: must differ from issuers.{other}.issuer; one may have none.")


def read_secret(issuer: Issuer, environ: Mapping[str, str]) -> bytes | None:
    """The shared secret; None for an issuer with a JWKS. Raises ValueError, which begins with the variable's name."""
    if issuer.secret_env is None:
        return None
    value = environ.get(issuer.secret_env, "").strip("\r\n")  # a mounted file ends in a line end
    if len(value.encode()) < SECRET_BYTES_MIN:
        raise ValueError(f"{issuer.secret_env}: must be set, to {SECRET_BYTES_MIN} or more random characters.")
    if _PEM_OR_JWK.match(value):
        raise ValueError(f"{issuer.secret_env}: looks like a public key or a JWK, which is no secret. Use jwks_url.")
    return value.encode()


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("jwks_url: cannot be read. Write https://host/path.") from None
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise ValueError("jwks_url: must begin with https:// (http only on this machine's loopback).")
    if not host or parts.username is not None or parts.fragment or not (url.isascii() and url.isprintable()):
        raise ValueError("jwks_url: must be https://host/path without a user, a fragment or blanks.")
