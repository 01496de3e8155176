"""Tokens that others sign: shared secrets and JWK sets over TLS, whom they name, and key servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from accounts import jwks
from accounts.external_issuers import ExternalIdentity, ExternalIssuers
from accounts.jwks import FetchedKeys
from accounts.jws import ExpiredToken, TokenRefused, TokensUnavailable, UnknownTokenKey
from config.issuers import Issuer, check_all
from tests.support import certificates
from tests.support.certificates import Certificates
from tests.support.jwks import ALGORITHMS, EC_KEY, ED_KEY, RSA_KEY, document, jwk
from tests.support.rawserver import Peer, RawServer, Script
from tests.support.tokens import NOW, Clock, signed

SECRET = b"a shared secret of more than thirty-two bytes"
ENVIRON = {"JWT_ACCESS_SECRET": SECRET.decode()}
ISS = "https://login.example"


def claims(**changed: Any) -> dict[str, Any]:
    """What a good token says; None takes a claim away."""
    good = {"sub": "u-7", "exp": int(NOW) + 60, "iat": int(NOW), "iss": ISS}
    return {name: value for name, value in {**good, **changed}.items() if value is not None}


def shared(header: dict[str, Any] | None = None, **changed: Any) -> str:
    """A token signed with the shared secret."""
    return signed({"alg": "HS256", "typ": "JWT", **(header or {})}, claims(**changed), SECRET, "HS256")


def response(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


async def of_shared(text: str, **rules: Any) -> ExternalIdentity:
    """Verify against one issuer with the shared secret."""
    issuer = Issuer(secret_env="JWT_ACCESS_SECRET", **rules)
    check_all({"own": issuer})
    return await ExternalIssuers({"own": issuer}, ENVIRON, clock=Clock()).verify(text)


@pytest.fixture(scope="module", name="trusted")
def trusted_fixture() -> Iterator[Certificates]:
    with tempfile.TemporaryDirectory(prefix="tollgate-tls-") as folder:
        yield certificates.make(Path(folder))


def fetching(server: RawServer, trust: ssl.SSLContext, **rules: Any) -> ExternalIssuers:
    """An issuer whose keys are at the server."""
    issuer = Issuer(jwks_url=f"https://localhost:{server.port}/keys", issuer=ISS, **rules)
    check_all({"login": issuer})
    return ExternalIssuers({"login": issuer}, {}, trust=trust, clock=Clock())


def listing(*documents: bytes) -> Script:
    """Each fetch gets the next document, and the last again and again."""
    given = list(documents)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(given.pop(0) if len(given) > 1 else given[0])
        await peer.until_gone()

    return script


async def test_a_token_of_the_shared_secret_names_who_it_is_about() -> None:
    text = shared(username="ada", email="ada@example.org", email_verified=True)
    assert await of_shared(text) == ExternalIdentity("own", "u-7", "ada", "ada@example.org", True, "user", NOW + 60)
    assert (await of_shared(shared(email="a@b.c"))).email_verified is False
    assert (await of_shared(shared({"kid": "any"}))).subject == "u-7"  # one secret has no name


@pytest.mark.parametrize("alg", ["none", "None", "hs256", "HS384", "HS512", "RS256", "ES256", "", None])
async def test_a_shared_secret_verifies_with_hs256_and_nothing_else(alg: object) -> None:
    text = shared({"alg": alg})
    for token in (text, f"{text.rpartition('.')[0]}."):
        with pytest.raises(TokenRefused):
            await of_shared(token)


async def test_another_secret_and_a_key_of_the_tokens_own_are_refused() -> None:
    for key in (b"", b"x" * 32, SECRET[:-1], SECRET.upper()):
        with pytest.raises(TokenRefused):
            await of_shared(signed({"alg": "HS256"}, claims(), key, "HS256"))
    inside = {"alg": "HS256", "jwk": {"kty": "oct", "k": "eA"}, "jku": "https://evil.example"}
    with pytest.raises(TokenRefused):
        await of_shared(signed(inside, claims(), b"x", "HS256"))


@pytest.mark.parametrize("name", ["jku", "x5u", "jwk", "x5c", "crit", "cty", "b64", "zip"])
async def test_a_header_that_brings_its_own_rules_is_refused_although_the_signature_is_right(name: str) -> None:
    with pytest.raises(TokenRefused):
        await of_shared(shared({name: ["exp"]}))


@pytest.mark.parametrize("missing", ["exp", "sub"])
async def test_exp_and_sub_are_required(missing: str) -> None:
    with pytest.raises(TokenRefused):
        await of_shared(shared(None, **{missing: None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exp", NOW - 31), ("exp", "1800000060"), ("exp", True), ("nbf", NOW + 31), ("iat", NOW + 31),
        ("nbf", True), ("iat", True), ("sub", ""), ("sub", 7),
        ("sub", "a\0"), ("sub", "x" * 256), ("email", 7), ("username", "x" * 321), ("email", "a\nb"),
    ],
)  # fmt: skip
async def test_a_claim_that_does_not_hold_is_refused(name: str, value: object) -> None:
    with pytest.raises(TokenRefused):
        await of_shared(shared(None, **{name: value}))


async def test_dates_are_taken_with_30_seconds_of_leeway() -> None:
    assert await of_shared(shared(exp=NOW - 29, nbf=NOW + 29, iat=NOW + 29))


async def test_what_is_configured_is_required_and_what_is_not_is_not() -> None:
    assert await of_shared(shared(iss="https://anybody", aud="x"), audience=())
    for iss in ("https://login.example/", None, [ISS], 1):
        with pytest.raises(TokenRefused, match="iss"):
            await of_shared(shared(iss=iss), issuer=ISS)
    assert await of_shared(shared(aud="b"), audience=("a", "b"))
    assert await of_shared(shared(aud=["c", "a"]), audience=("a", "b"))
    for aud in ("c", ["c"], [], None, {"a": 1}, [["a"]], "ab"):
        with pytest.raises(TokenRefused, match="aud"):
            await of_shared(shared(aud=aud), audience=("a", "b"))
    assert await of_shared(shared({"typ": "application/AT+jwt"}), typ="at+jwt")
    for typ in ("JWT", "", None, 1):
        with pytest.raises(TokenRefused, match="typ"):
            await of_shared(shared({"typ": typ}), typ="at+jwt")


async def test_a_maximum_age_needs_an_iat_that_is_not_older() -> None:
    assert await of_shared(shared(iat=NOW - 629), max_age_s=600)
    with pytest.raises(ExpiredToken):
        await of_shared(shared(iat=NOW - 630), max_age_s=600)
    with pytest.raises(TokenRefused):
        await of_shared(shared(iat=None), max_age_s=600)


@pytest.mark.parametrize(
    ("role", "trusted", "expected"),
    [
        ("admin", True, "user"), ("boss", True, "admin"), ("boss", False, "user"), ("lead", False, "supervisor"),
        (["staff", "lead"], False, "supervisor"), (["boss", "lead"], False, "supervisor"), (["boss"], True, "admin"),
        (None, True, "user"), ("Boss", True, "user"), ({"boss": 1}, True, "user"), ([["boss"]], True, "user"),
        (["boss"] * 65, True, "user"), (True, True, "user"),
    ],
)  # fmt: skip
async def test_a_role_comes_from_the_map_and_admin_only_where_roles_are_trusted(
    role: object, trusted: bool, expected: str
) -> None:
    rules: Any = {"role_map": {"boss": "admin", "lead": "supervisor", "staff": "user"}, "trust_roles": trusted}
    assert (await of_shared(shared(groups=role, role="admin"), role_claim="groups", **rules)).role == expected


async def test_each_of_several_issuers_speaks_only_for_itself() -> None:
    issuers = {
        "one": Issuer(secret_env="ONE", issuer="https://one"),
        "two": Issuer(secret_env="TWO", issuer="https://two"),
    }
    check_all(issuers)
    both = ExternalIssuers(issuers, {"ONE": "1" * 32, "TWO": "2" * 32}, clock=Clock())
    head = {"alg": "HS256"}
    assert (await both.verify(signed(head, claims(iss="https://two"), b"2" * 32, "HS256"))).issuer == "two"
    for iss in ("https://one", "https://three", None):
        with pytest.raises(TokenRefused):
            await both.verify(signed(head, claims(iss=iss), b"2" * 32, "HS256"))


@pytest.mark.parametrize(("key", "alg"), [(RSA_KEY, "RS256"), (EC_KEY, "ES256"), (ED_KEY, "EdDSA")])
async def test_keys_are_fetched_over_tls_and_verify_with_their_own_algorithm(
    key: Any, alg: str, trusted: Certificates
) -> None:
    body = document(jwk(RSA_KEY, kid="r"), jwk(EC_KEY, kid="e"), jwk(ED_KEY, kid="d", alg="EdDSA", use="sig"))
    own = {"RS256": "r", "ES256": "e", "EdDSA": "d"}[alg]
    async with RawServer(listing(response(body)), tls=trusted.server()) as server:
        issuers = fetching(server, trusted.client())
        header = {"alg": alg, "kid": own}
        assert (await issuers.verify(signed(header, claims(), key, alg))).subject == "u-7"
        for kid in sorted({"r", "e", "d"} - {own}):  # another key, whose algorithm is another
            with pytest.raises(TokenRefused):
                await issuers.verify(signed({**header, "kid": kid}, claims(), key, alg))
        for wrong in ({"alg": alg}, {**header, "alg": "none"}, {**header, "alg": alg.lower()}):
            with pytest.raises(TokenRefused):
                await issuers.verify(signed(wrong, claims(), key, alg))
        assert len(server.requests) == 2  # the first, and one for a token without a key's name
        await issuers.aclose()


async def test_a_public_key_is_nobodys_shared_secret(trusted: Certificates) -> None:
    listed = jwk(RSA_KEY, kid="r")
    async with RawServer(listing(response(document(listed))), tls=trusted.server()) as server:
        issuers = fetching(server, trusted.client())
        for secret in (json.dumps(listed).encode(), listed["n"].encode(), b""):
            with pytest.raises(TokenRefused, match="InvalidAlgorithm"):
                await issuers.verify(signed({"alg": "HS256", "kid": "r"}, claims(), secret, "HS256"))
        zeros = signed({"alg": "RS256", "kid": "r"}, claims(), b"", "HS256").rpartition(".")[0] + "." + "A" * 342
        with pytest.raises(TokenRefused):
            await issuers.verify(zeros)
        await issuers.aclose()


async def test_the_only_key_needs_no_name_in_the_token(trusted: Certificates) -> None:
    async with RawServer(listing(response(document(jwk(EC_KEY, kid="e")))), tls=trusted.server()) as server:
        issuers = fetching(server, trusted.client())
        assert await issuers.verify(signed({"alg": "ES256"}, claims(), EC_KEY, "ES256"))
        await issuers.aclose()


async def test_a_rotated_key_is_fetched_once_for_all_who_wait(trusted: Certificates) -> None:
    before, after = document(jwk(EC_KEY, kid="old")), document(jwk(RSA_KEY, kid="new"))
    async with RawServer(listing(response(before), response(after)), tls=trusted.server()) as server:
        issuers = fetching(server, trusted.client())
        old, new = (
            signed({"alg": "ES256", "kid": "old"}, claims(), EC_KEY, "ES256"),
            signed({"alg": "RS256", "kid": "new"}, claims(), RSA_KEY, "RS256"),
        )
        assert await issuers.verify(old)
        assert len(await asyncio.gather(*(issuers.verify(new) for _ in range(20)))) == 20
        assert len(server.requests) == 2
        for number in range(5):  # invented names ask for nothing more
            with pytest.raises(UnknownTokenKey):
                await issuers.verify(signed({"alg": "ES256", "kid": f"x{number}"}, claims(), EC_KEY, "ES256"))
        with pytest.raises(UnknownTokenKey):
            await issuers.verify(old)
        assert len(server.requests) == 2
        await issuers.aclose()


BAD = {
    "an error": response(b"{}", "500 Internal Server Error"),
    "an error with good keys": response(document(jwk(EC_KEY, kid="e")), "503 Service Unavailable"),
    "a redirect": response(b"", "302 Found", "location: /good\r\nconnection: close\r\n"),
    "too large": response(document(jwk(EC_KEY, kid="e")) + b" " * jwks.DOCUMENT_BYTES_MAX),
    "too large a promise": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"10000\r\n" + b" " * 65536,
    "no JSON": response(b"<html>"),
    "no set": response(b"[]"),
    "no list": response(b'{"keys": {}}'),
    "two lists": response(b'{"keys": [], "keys": []}'),
    "too many keys": response(document(*(jwk(EC_KEY, kid=f"e{number}") for number in range(jwks.KEYS_MAX + 1)))),
    "cut off": response(document(jwk(EC_KEY, kid="e")))[:-5],
    "no HTTP": b"hello\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD)
async def test_without_usable_keys_nobody_is_let_in_and_the_server_is_left_alone(
    name: str, trusted: Certificates
) -> None:
    async def script(peer: Peer) -> None:
        good = (await peer.request()).startswith(b"GET /good")
        await peer.send(response(document(jwk(EC_KEY, kid="e"))) if good else BAD[name])
        peer.close()

    async with RawServer(script, tls=trusted.server()) as server:
        issuers = fetching(server, trusted.client())
        for _ in range(3):
            with pytest.raises(TokensUnavailable):
                await issuers.verify(signed({"alg": "ES256", "kid": "e"}, claims(), EC_KEY, "ES256"))
        assert len(server.requests) == 1
        await issuers.aclose()


async def test_keys_that_were_fetched_outlive_a_servers_failure(trusted: Certificates) -> None:
    good = response(document(jwk(EC_KEY, kid="e")))
    async with RawServer(listing(good, response(b"", "500 Oops")), tls=trusted.server()) as server:
        issuers = fetching(server, trusted.client())
        text = signed({"alg": "ES256", "kid": "e"}, claims(), EC_KEY, "ES256")
        assert await issuers.verify(text)
        with pytest.raises(UnknownTokenKey):
            await issuers.verify(signed({"alg": "ES256", "kid": "new"}, claims(), EC_KEY, "ES256"))
        assert len(server.requests) == 2
        assert await issuers.verify(text)
        await issuers.aclose()


async def test_a_slow_server_is_given_up_and_all_who_wait_with_it(trusted: Certificates) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n")
        while True:  # each byte comes well before any pause between two bytes would count as an end
            await peer.send(b" ")
            await asyncio.sleep(0.2)

    async with RawServer(script, tls=trusted.server()) as server:
        keys = FetchedKeys(f"https://localhost:{server.port}/keys", ALGORITHMS, trusted.client(), fetch_s=0.5)
        began = asyncio.get_running_loop().time()
        asked = await asyncio.gather(*(keys.key("e") for _ in range(5)), return_exceptions=True)
        assert [type(one) for one in asked] == [TokensUnavailable] * 5
        assert asyncio.get_running_loop().time() - began < 3
        assert len(server.requests) == 1
        await keys.aclose()


async def test_a_caller_that_gives_up_takes_nothing_from_the_others(trusted: Certificates) -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await go.wait()
        await peer.send(response(document(jwk(EC_KEY, kid="e"))))

    async with RawServer(script, tls=trusted.server()) as server:
        keys = FetchedKeys(f"https://localhost:{server.port}/keys", ALGORITHMS, trusted.client())
        first, second = (asyncio.create_task(keys.key("e")) for _ in range(2))
        await asked.wait()
        first.cancel()
        go.set()
        assert (await second).kid == "e"
        await keys.aclose()


async def test_a_server_that_nobody_vouches_for_gives_no_keys(trusted: Certificates) -> None:
    async with RawServer(listing(response(document(jwk(EC_KEY, kid="e")))), tls=trusted.server()) as server:
        issuers = fetching(server, ssl.create_default_context())
        with pytest.raises(TokensUnavailable):
            await issuers.verify(signed({"alg": "ES256", "kid": "e"}, claims(), EC_KEY, "ES256"))
        assert server.requests == []
        await issuers.aclose()


async def refusal(keys: FetchedKeys, kid: str) -> type[Exception] | None:
    """What asking for a known key ends in, some time within ten seconds."""
    deadline = asyncio.get_running_loop().time() + 10
    while asyncio.get_running_loop().time() < deadline:
        try:
            await keys.key(kid)
        except (TokenRefused, TokensUnavailable) as error:
            return type(error)
        await asyncio.sleep(0.01)
    return None


async def test_a_key_that_its_issuer_took_back_goes_with_the_next_reading(trusted: Certificates) -> None:
    before, after = response(document(jwk(EC_KEY, kid="old"))), response(document(jwk(RSA_KEY, kid="new")))
    async with RawServer(listing(before, after, response(b"", "500 Oops")), tls=trusted.server()) as server:
        keys = FetchedKeys(f"https://localhost:{server.port}/keys", ALGORITHMS, trusted.client(), fresh_s=0.1)
        assert (await keys.key("old")).algorithm == "ES256"
        assert await refusal(keys, "old") is UnknownTokenKey
        assert await refusal(keys, "new") is TokensUnavailable  # the server fails from now on, until the set is too old
        await keys.aclose()
