"""The API key's form, its checksum and its stored digest: pure, so that a bad key is refused before any store is asked.

`tg_live_<8 id>_<43 secret>_<6 checksum>`, all base62. Must not: do I/O, keep a key, or put key text into an error.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from dataclasses import dataclass, field

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PREFIX = "tg_live_"
ID_CHARS, SECRET_CHARS, CHECKSUM_CHARS = 8, 43, 6
HEADER_BYTES_MAX = 256
"""An Authorization header longer than this cannot hold one of our keys."""

SCANNER_PATTERN = r"tg_live_[0-9A-Za-z]{8}_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}"
"""What a secret scanner should look for; verify a hit with the checksum."""

_HEADER = re.compile(rb"(?i:bearer) +(tg_live_([0-9A-Za-z]{8})_([0-9A-Za-z]{43}))_([0-9A-Za-z]{6}) *")
_BEARER = re.compile(rb"(?i:bearer)[ \t]+[^ \t]")


class KeyRefused(Exception):
    """The API key was not accepted."""


class MissingKey(KeyRefused):
    """You didn't provide an API key. Send it in the header `Authorization: Bearer YOUR_KEY`."""


class MalformedKey(KeyRefused):
    """Incorrect API key provided: this is not a whole Tollgate key. Check that it was copied completely."""


class UnknownKey(KeyRefused):
    """Incorrect API key provided. Ask whoever runs this gateway for a valid one."""


class RevokedKey(KeyRefused):
    """This API key was revoked. Ask whoever runs this gateway for a new one."""


class KeysUnavailable(Exception):
    """API keys cannot be checked at the moment. Retry shortly."""


@dataclass(frozen=True, slots=True)
class PresentedKey:
    """A key with a right checksum, as a client sent it; nothing is known about it yet."""

    id: str
    secret: bytes = field(repr=False)
    text: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made. `text` is shown to its owner once and stored nowhere."""

    id: str
    secret: bytes = field(repr=False)
    text: str = field(repr=False)


def base62(number: int, width: int) -> str:
    """`number` in base62, padded with zeros to `width`."""
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))


def checksum(body: bytes) -> str:
    """CRC-32 of `tg_live_<id>_<secret>` in six base62 digits: finds typing and copying errors, proves nothing."""
    return base62(zlib.crc32(body), CHECKSUM_CHARS)


def random_base62(width: int) -> str:
    """`width` characters from the system's random source."""
    return "".join(secrets.choice(ALPHABET) for _ in range(width))


def mint() -> NewKey:
    """A new random key: 47 bits of id, 256 bits of secret."""
    key_id, secret = random_base62(ID_CHARS), random_base62(SECRET_CHARS)
    body = f"{PREFIX}{key_id}_{secret}"
    return NewKey(id=key_id, secret=secret.encode(), text=f"{body}_{checksum(body.encode())}")


def parse(header: bytes) -> PresentedKey:
    """Read an Authorization header's value. Raises MissingKey (no bearer token) or MalformedKey (form, checksum)."""
    if len(header) <= HEADER_BYTES_MAX:
        match = _HEADER.fullmatch(header)
        if match is not None:
            body, key_id, secret, given = match.groups()
            if checksum(body).encode() == given:
                return PresentedKey(id=key_id.decode(), secret=secret, text=body + b"_" + given)
    if _BEARER.match(header) is None:
        raise MissingKey
    raise MalformedKey


def mac_of(pepper: bytes, secret: bytes) -> bytes:
    """What is stored of a secret: HMAC-SHA256(pepper, secret), 32 bytes."""
    return hmac.digest(pepper, secret, "sha256")


def fingerprint(pepper: bytes) -> str:
    """16 hex digits that name a pepper without helping to find it."""
    return hmac.digest(pepper, b"tollgate pepper fingerprint", hashlib.sha256).hex()[:16]
