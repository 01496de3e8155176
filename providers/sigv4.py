"""AWS Signature Version 4: the headers that sign one request. Pure: the time is an argument.

Must not: read a clock, find credentials, or show a secret. Source of the algorithm: AWS IAM User Guide, "Create a
signed AWS API request"; it has not changed since 2012. Held by vectors of AWS's own test suite.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from urllib.parse import quote

Header = tuple[bytes, bytes]

_ALGORITHM = "AWS4-HMAC-SHA256"
_SCOPE_END = "aws4_request"


@dataclass(frozen=True, slots=True)
class Credentials:
    """An access key. `session_token` where it is a temporary one."""

    access_key_id: str
    secret: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, key: str) -> Credentials | None:
        """`ACCESS_KEY_ID:SECRET` or `ACCESS_KEY_ID:SECRET:SESSION_TOKEN`, none of which has a colon; else None."""
        parts = key.split(":")
        if len(parts) not in (2, 3) or not all(parts):
            return None
        return cls(*parts)


@dataclass(frozen=True, slots=True)
class Unsigned:
    """What is signed. `target` is the path and query as they are sent; `headers` have the host and whatever else must
    arrive as it left."""

    method: bytes
    target: bytes
    headers: tuple[Header, ...]
    body: bytes


def signing_headers(
    request: Unsigned, credentials: Credentials, *, region: str, service: str, epoch_s: int
) -> tuple[Header, ...]:
    """The headers to add. AWS takes the signature from 5 minutes before until 5 minutes after `epoch_s`."""
    time = datetime.fromtimestamp(epoch_s, UTC).strftime("%Y%m%dT%H%M%SZ")
    added: tuple[Header, ...] = ((b"x-amz-date", time.encode()),)
    if credentials.session_token is not None:
        added += ((b"x-amz-security-token", credentials.session_token.encode()),)
    names, canonical = canonical_request(request, added)
    scope = f"{time[:8]}/{region}/{service}/{_SCOPE_END}"
    text = f"{_ALGORITHM}\n{time}\n{scope}\n{sha256(canonical).hexdigest()}"
    key = f"AWS4{credentials.secret}".encode()
    for part in (time[:8], region, service, _SCOPE_END, text):
        key = hmac.digest(key, part.encode(), "sha256")
    authorization = (
        f"{_ALGORITHM} Credential={credentials.access_key_id}/{scope}, "
        f"SignedHeaders={names.decode()}, Signature={key.hex()}"
    )
    return (*added, (b"authorization", authorization.encode()))


def canonical_request(request: Unsigned, added: tuple[Header, ...]) -> tuple[bytes, bytes]:
    """The names of the signed headers, and the text whose hash is signed. The path as sent is encoded once more, as AWS
    wants it from every service but S3; it has no dot segments (whoever builds it sees to that)."""
    path, _, query = request.target.partition(b"?")
    values: dict[bytes, list[bytes]] = {}
    for name, value in (*request.headers, *added):
        values.setdefault(name.lower(), []).append(b" ".join(value.split()))
    names = b";".join(sorted(values))
    lines = [
        request.method,
        quote(path, safe="/~").encode(),
        b"&".join(sorted(pair if b"=" in pair else pair + b"=" for pair in query.split(b"&") if pair)),
        *(b"%b:%b" % (name, b",".join(values[name])) for name in sorted(values)),
        b"",
        names,
        sha256(request.body).hexdigest().encode(),
    ]
    return names, b"\n".join(lines)
