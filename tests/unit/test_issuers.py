"""`[issuers.<name>]`: which tables and secrets can be used, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest

from config.issuers import Issuer, check_all, read_secret

ISS = "https://login.example"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "secret_env"), ({"secret_env": "A", "jwks_url": "https://a/b"}, "secret_env"),
        ({"secret_env": "A B"}, "environment variable"), ({"jwks_url": "http://a/b"}, "https"),
        ({"jwks_url": "file:///etc/passwd"}, "https"), ({"jwks_url": "https://u:p@a/b"}, "without a user"),
        ({"jwks_url": "https:///b"}, "https://host"), ({"jwks_url": "https://a:x/b"}, "cannot be read"),
        ({"jwks_url": "https://a/b", "algorithms": ()}, "algorithms"), ({"secret_env": "A", "issuer": ""}, "empty"),
        ({"secret_env": "A", "max_age_s": 0}, "max_age_s"), ({"secret_env": "A", "role_claim": ""}, "role_claim"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used_says_which_key_is_at_fault(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"issuers.x.*{message}"):
        check_all({"x": Issuer(**rules)})


def test_two_issuers_that_a_token_could_not_tell_apart_are_refused() -> None:
    for iss in (None, ISS):
        with pytest.raises(ValueError, match=r"issuers\.b\.issuer"):
            check_all({"a": Issuer(secret_env="A", issuer=iss), "b": Issuer(secret_env="B", issuer=iss)})
    check_all({"a": Issuer(secret_env="A"), "b": Issuer(secret_env="B", issuer=ISS)})


@pytest.mark.parametrize(
    "value", [None, "", "x" * 31, "-----BEGIN PUBLIC KEY-----" + "x" * 40, '{"kty": "oct", "k": "' + "x" * 40 + '"}']
)
def test_a_shared_secret_is_long_and_no_public_key(value: str | None) -> None:
    with pytest.raises(ValueError, match="JWT_ACCESS_SECRET"):
        read_secret(Issuer(secret_env="JWT_ACCESS_SECRET"), {} if value is None else {"JWT_ACCESS_SECRET": value})
