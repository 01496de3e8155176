"""Which keys of a JWK set are taken, and for which one algorithm each."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from accounts.jwks import read_set
from tests.support.jwks import ALGORITHMS, EC_KEY, ED_KEY, RSA_KEY, document, jwk

SMALL = rsa.generate_private_key(65537, 1024)
UNUSABLE = {
    "symmetric": {"kty": "oct", "k": "c2VjcmV0", "alg": "HS256", "kid": "a"},
    "private": jwk(EC_KEY, d="AA"),
    "for encryption": jwk(RSA_KEY, use="enc"),
    "not for verifying": jwk(RSA_KEY, key_ops=["encrypt"]),
    "of another algorithm": jwk(RSA_KEY, alg="PS256"),
    "HS256 on an RSA key": jwk(RSA_KEY, alg="HS256"),
    "none on an RSA key": jwk(RSA_KEY, alg="none"),
    "ES256 on an RSA key": jwk(RSA_KEY, alg="ES256"),
    "too small": {**RSAAlgorithm.to_jwk(SMALL.public_key(), as_dict=True)},
    "too large": jwk(RSA_KEY, n="A" * 2_000),
    "another curve": jwk(EC_KEY, crv="P-384"),
    "not on its curve": jwk(EC_KEY, y="A" * 43),
    "no numbers": {"kty": "EC", "crv": "P-256"},
    "numbers as text": jwk(EC_KEY, x=7),
    "a name that is a number": jwk(EC_KEY, kid=7),
    "text": "key",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_key_that_is_not_for_this_is_passed_over_and_the_others_are_taken(name: str) -> None:
    raw = json.dumps({"keys": [UNUSABLE[name], jwk(ED_KEY, kid="d")]}).encode()
    assert [(key.kid, key.algorithm) for key in read_set(raw, ALGORITHMS)] == [("d", "EdDSA")]


def test_two_keys_of_one_name_are_both_passed_over() -> None:
    raw = document(jwk(EC_KEY, kid="a"), jwk(RSA_KEY, kid="a"), jwk(ED_KEY, kid="d"))
    assert [key.kid for key in read_set(raw, ALGORITHMS)] == ["d"]


def test_a_key_without_alg_gets_the_first_algorithm_that_fits_it() -> None:
    (key,) = read_set(document(jwk(RSA_KEY)), ("ES256", "PS256", "RS256"))
    assert key.algorithm == "PS256"
    (key,) = read_set(document(jwk(RSA_KEY, alg="RS256")), ("ES256", "PS256", "RS256"))
    assert key.algorithm == "RS256"
