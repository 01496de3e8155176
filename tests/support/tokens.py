"""Access tokens as attackers and honest issuers make them, put together by hand so that none is refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from accounts.tokens import Identity, KeyRing, SigningKey, Tokens

NOW = 1_800_000_000.0
ISSUER, AUDIENCE = "https://tollgate.example", "tollgate"
WHO = Identity("user_1", "ada", "ada@example.org", "user", 3)


class Clock:
    """A clock that stands until it is set."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def b64(raw: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def packed(value: object) -> str:
    """JSON in base64url; text is taken as it is."""
    return b64((value if isinstance(value, str) else json.dumps(value)).encode())


def signed(header: object, claims: object, key: Any, algorithm: str) -> str:
    """A token over any header and claims (text stands for itself), signed with `algorithm` whatever the header says."""
    body = f"{packed(header)}.{packed(claims)}"
    if algorithm == "HS256":
        return f"{body}.{b64(hmac.digest(key, body.encode(), hashlib.sha256))}"
    signer = jwt.PyJWS().get_algorithm_by_name(algorithm)
    return f"{body}.{b64(signer.sign(body.encode(), key))}"


def signing_key(kid: str = "k1", signs_from: float = 0.0, not_after: float | None = None) -> SigningKey:
    """A fresh key pair."""
    return SigningKey(kid, ec.generate_private_key(ec.SECP256R1()), signs_from, not_after)


def pem(key: SigningKey) -> bytes:
    """Its public key, as anybody can have it."""
    return key.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def tokens(*keys: SigningKey, clock: Clock | None = None) -> Tokens:
    """Tokens of these keys."""
    made = Tokens(ISSUER, AUDIENCE, clock=clock or Clock())
    made.ring = KeyRing(keys)
    return made


def own_claims(**changed: Any) -> dict[str, Any]:
    """What a good token of ours says; None takes a claim away."""
    claims = {
        "sub": WHO.id, "username": WHO.username, "email": WHO.email, "role": WHO.role, "iss": ISSUER, "aud": AUDIENCE,
        "exp": int(NOW) + 900, "iat": int(NOW), "jti": "j1", "token_version": 3,
    }  # fmt: skip
    return {name: value for name, value in {**claims, **changed}.items() if value is not None}


HEADER = {"alg": "ES256", "typ": "at+jwt", "kid": "k1"}
