"""Key pairs of other issuers, and the JWK sets that list them."""

from __future__ import annotations

import json
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from config.issuers import PublicAlgorithm

RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()
ALGORITHMS: tuple[PublicAlgorithm, ...] = ("RS256", "ES256", "EdDSA")


def jwk(key: Any, **members: Any) -> dict[str, Any]:
    """The public key as a JWK set lists it."""
    kind = RSAAlgorithm if key is RSA_KEY else OKPAlgorithm if key is ED_KEY else ECAlgorithm
    return {**kind.to_jwk(key.public_key(), as_dict=True), **members}


def document(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()
