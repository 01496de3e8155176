"""Our own access tokens: what they say, and that every forgery of RFC 8725 and its relatives is refused."""

from __future__ import annotations

import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from accounts.jws import TOKEN_CHARS_MAX, ExpiredToken, TokenRefused, TokensUnavailable, UnknownTokenKey
from accounts.tokens import KeyRing, Tokens, looks_own
from tests.support.tokens import (
    AUDIENCE,
    HEADER,
    ISSUER,
    NOW,
    WHO,
    Clock,
    b64,
    own_claims,
    packed,
    pem,
    signed,
    signing_key,
    tokens,
)

KEY = signing_key()
VERIFIER = tokens(KEY)
GOOD = signed(HEADER, own_claims(), KEY.private, "ES256")
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def made(header: object = HEADER, **claims: Any) -> str:
    """A token that is right in everything but what is said here."""
    return signed(header, own_claims(**claims), KEY.private, "ES256")


def test_a_token_says_who_it_was_made_for_and_lives_15_minutes() -> None:
    text = VERIFIER.issue(WHO)
    claims = VERIFIER.verify(text)
    assert (claims.sub, claims.username, claims.email, claims.role, claims.token_version) == (
        "user_1", "ada", "ada@example.org", "user", 3,
    )  # fmt: skip
    assert (claims.iss, claims.aud, claims.iat, claims.exp) == (ISSUER, AUDIENCE, NOW, NOW + 900)
    assert jwt.get_unverified_header(text) == HEADER
    assert VERIFIER.verify(VERIFIER.issue(WHO)).jti != claims.jti


def test_the_hand_made_token_that_the_forgeries_start_from_is_accepted() -> None:
    assert VERIFIER.verify(GOOD).sub == "user_1"
    assert VERIFIER.verify(made(unknown_claim=[1])).sub == "user_1"


def test_the_published_keys_verify_our_tokens_and_hold_nothing_private() -> None:
    text, document = VERIFIER.issue(WHO), VERIFIER.document()
    (listed,) = document["keys"]
    assert set(listed) == {"kty", "crv", "x", "y", "kid", "use", "alg"}
    found = jwt.PyJWKSet.from_json(json.dumps(document))["k1"]
    options: Any = {"verify_exp": False, "verify_iat": False}
    assert jwt.decode(text, found, ["ES256"], options=options, audience=AUDIENCE, issuer=ISSUER)["sub"] == "user_1"


def forgeries() -> dict[str, str]:
    public, document = pem(KEY), json.dumps(VERIFIER.document()["keys"][0]).encode()
    x = VERIFIER.document()["keys"][0]["x"].encode()
    stranger = ec.generate_private_key(ec.SECP256R1())
    head, claims, signature = GOOD.split(".")
    hs256 = {**HEADER, "alg": "HS256"}
    found = {
        f"alg {name!r} unsigned": f"{packed({**HEADER, 'alg': name})}.{packed(own_claims())}.{end}"
        for name in ("none", "None", "NONE", "nOnE", "", None, ["ES256"], "HS256")
        for end in ("", signature)
    }
    found |= {
        f"HS256 with {name}": signed(hs256, own_claims(), key, "HS256")
        for name, key in {
            "the PEM": public, "the stripped PEM": public.strip(), "the JWK": document, "x": x, "nothing": b"",
        }.items()
    }  # fmt: skip
    found |= {
        f"alg {name}": made({**HEADER, "alg": name}) for name in ("es256", "Es256", "ES256 ", "ES384", "EdDSA", "RS256")
    }
    found |= {
        f"header {name}": made({**HEADER, name: value})
        for name, value in {
            "jku": "https://evil.example/jwks", "x5u": "https://evil.example/cert", "x5c": ["MA=="],
            "jwk": json.loads(document), "crit": ["exp"], "b64": False, "cty": "JWT", "zip": "DEF", "enc": "A256GCM",
            "anything": 1,
        }.items()
    }  # fmt: skip
    own_jwk = {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}
    found["a stranger's key in jwk"] = signed({**HEADER, "jwk": own_jwk}, own_claims(), stranger, "ES256")
    found["a stranger's key"] = signed(HEADER, own_claims(), stranger, "ES256")
    found["nested"] = signed({**HEADER, "cty": "JWT"}, f'"{GOOD}"', KEY.private, "ES256")
    found["nested without cty"] = signed(HEADER, f'"{GOOD}"', KEY.private, "ES256")
    for name, number in {"zero": 0, "the order": P256_ORDER, "one": 1}.items():
        found[f"psychic signature of {name}"] = f"{head}.{claims}.{b64(number.to_bytes(32, 'big') * 2)}"
    found["DER zeros"] = f"{head}.{claims}.{b64(bytes.fromhex('3006020100020100'))}"
    found["short signature"] = f"{head}.{claims}.{signature[:-4]}"
    found["other claims"] = f"{head}.{packed(own_claims(role='admin'))}.{signature}"
    return found


FORGERIES = forgeries()


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_token_is_refused(name: str) -> None:
    with pytest.raises(TokenRefused):
        VERIFIER.verify(FORGERIES[name])


@pytest.mark.parametrize("typ", ["JWT", "jwt", "AT+JWT", "application/at+jwt", "refresh", "", None, 1, ["at+jwt"]])
def test_a_token_of_another_type_is_refused(typ: object) -> None:
    with pytest.raises(TokenRefused):
        VERIFIER.verify(made({**HEADER, "typ": typ}))


@pytest.mark.parametrize("name", HEADER)
def test_every_header_is_required(name: str) -> None:
    with pytest.raises(TokenRefused):
        VERIFIER.verify(made({key: value for key, value in HEADER.items() if key != name}))


@pytest.mark.parametrize("kid", ["k2", "K1", "k1 ", "../k1", "k1\0", "' OR 1=1 --", "", 1, None, ["k1"], {"k1": 1}])
def test_a_token_with_a_wrong_key_id_is_refused_although_its_signature_is_right(kid: object) -> None:
    with pytest.raises(TokenRefused):
        VERIFIER.verify(made({**HEADER, "kid": kid}))


@pytest.mark.parametrize("name", own_claims())
def test_every_claim_is_required(name: str) -> None:
    with pytest.raises(TokenRefused):
        VERIFIER.verify(made(**{name: None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iss", "https://other.example"), ("iss", ISSUER + "/"), ("iss", [ISSUER]), ("aud", "other"),
        ("aud", [AUDIENCE]), ("aud", ["other", AUDIENCE]), ("role", "root"), ("role", "Admin"), ("role", ["user"]),
        ("sub", ""), ("sub", 7), ("sub", "a\0b"), ("sub", "s" * 256), ("token_version", "3"), ("token_version", True),
        ("exp", str(int(NOW) + 60)), ("exp", True), ("exp", -1), ("exp", 1e300), ("exp", 10**30), ("iat", "now"),
    ],
)  # fmt: skip
def test_a_claim_with_another_value_is_refused(name: str, value: object) -> None:
    with pytest.raises(TokenRefused):
        VERIFIER.verify(made(**{name: value}))


def test_a_token_that_lives_longer_than_ours_do_is_refused_although_it_is_signed() -> None:
    assert VERIFIER.verify(made(exp=int(NOW) + 900))
    with pytest.raises(TokenRefused, match="longer"):
        VERIFIER.verify(made(exp=int(NOW) + 901))
    with pytest.raises(TokenRefused, match="longer"):
        VERIFIER.verify(made(exp=int(NOW), iat=int(NOW)))


def test_dates_are_taken_with_30_seconds_of_leeway_and_no_more() -> None:
    clock = Clock()
    verifier = tokens(KEY, clock=clock)
    clock.now = NOW + 900 + 29.9
    assert verifier.verify(GOOD)
    clock.now = NOW + 900 + 30
    with pytest.raises(ExpiredToken):
        verifier.verify(GOOD)
    clock.now = NOW - 30
    assert verifier.verify(GOOD)
    clock.now = NOW - 30.1
    with pytest.raises(TokenRefused, match="iat lies ahead"):
        verifier.verify(GOOD)


def test_a_token_is_not_taken_before_its_nbf() -> None:
    assert VERIFIER.verify(made(nbf=int(NOW) + 30))
    with pytest.raises(TokenRefused, match="nbf lies ahead"):
        VERIFIER.verify(made(nbf=int(NOW) + 31))
    with pytest.raises(TokenRefused):
        VERIFIER.verify(made(nbf="soon"))


@pytest.mark.parametrize(
    "text",
    [
        '{"alg":"none","alg":"ES256","typ":"at+jwt","kid":"k1"}',
        '{"alg":"ES256","typ":"at+jwt","kid":"k2","kid":"k1"}',
    ],
)
def test_a_header_that_is_there_twice_is_refused(text: str) -> None:
    with pytest.raises(TokenRefused, match="JSON"):
        VERIFIER.verify(made(text))


def doctored(before: str, after: str) -> str:
    text = json.dumps(own_claims())
    assert before in text
    return signed(HEADER, text.replace(before, after), KEY.private, "ES256")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"role": "user"', '"role": "admin", "role": "user"'),
        ('"role": "user"', '"role": "user", "r\\u006fle": "user"'),
        ('"jti": "j1"', '"jti": "j1", "more": {"a": 1, "a": 2}'),
        ('"jti": "j1"', '"jti": "j1", "more": NaN'),
        ('"jti": "j1"', '"jti": "j1", "more": -Infinity'),
        ('"jti": "j1"', '"jti": "j1", "more": ' + "[" * 2_500 + "]" * 2_500),
        ('"jti": "j1"', '"jti": "j1", "more": ' + "9" * 5_000),
        ('"exp": 1800000900', '"exp": 1e999'),
        ('"sub": "user_1"', '"sub": "\\ud800"'),
    ],
)
def test_claims_that_two_readers_would_read_differently_are_refused(before: str, after: str) -> None:
    with pytest.raises(TokenRefused):
        VERIFIER.verify(doctored(before, after))


HEAD, CLAIMS, SIGNATURE = GOOD.split(".")
MISSHAPEN = {
    "empty": "", "dots": "..", "two parts": f"{HEAD}.{CLAIMS}", "four parts": f"{GOOD}.{SIGNATURE}",
    "five parts (JWE)": f"{GOOD}.{SIGNATURE}.{SIGNATURE}", "padding": f"{HEAD}.{CLAIMS}.{SIGNATURE}==",
    "blank before": f" {GOOD}", "line end after": f"{GOOD}\n", "blank inside": f"{HEAD}. {CLAIMS}.{SIGNATURE}",
    "plus and slash": f"{HEAD}.{CLAIMS}.+/{SIGNATURE[2:]}", "other letters": f"{HEAD}.{CLAIMS}.ü{SIGNATURE[1:]}",
    "an odd length": f"{HEAD}.{CLAIMS}.{SIGNATURE[:-1]}", "no JSON": f"{b64(b'x')}.{CLAIMS}.{SIGNATURE}",
    "a list": signed(HEADER, "[]", KEY.private, "ES256"), "a list as header": made("[]"), "null": made("null"),
    "UTF-16": f"{b64(json.dumps(HEADER).encode('utf-16'))}.{CLAIMS}.{SIGNATURE}",
    "JSON serialization": json.dumps({"protected": HEAD, "payload": CLAIMS, "signature": SIGNATURE}),
    "other last bits": f"{HEAD}.{CLAIMS}.{SIGNATURE[:-1]}{chr(ord(SIGNATURE[-1]) + 1)}",
}  # fmt: skip


@pytest.mark.parametrize("name", MISSHAPEN)
def test_what_is_not_one_compact_token_is_refused(name: str) -> None:
    with pytest.raises(TokenRefused):
        VERIFIER.verify(MISSHAPEN[name])


def test_a_token_of_more_characters_than_are_taken_is_refused_before_it_is_read() -> None:
    long = made(more="x" * TOKEN_CHARS_MAX)
    with pytest.raises(TokenRefused, match="too long"):
        VERIFIER.verify(long)
    assert VERIFIER.verify(made(more="x" * (TOKEN_CHARS_MAX // 2)))


@given(
    st.text(max_size=200)
    | st.lists(st.binary(max_size=40), min_size=3, max_size=3).map(lambda p: ".".join(map(b64, p)))
)
def test_no_text_raises_anything_but_a_refusal(text: str) -> None:
    with pytest.raises(TokenRefused):
        VERIFIER.verify(text)


@given(st.integers(0, len(GOOD) - 1), st.sampled_from("ABCDwxyz0189-_"))
def test_no_changed_character_is_accepted(place: int, letter: str) -> None:
    changed = GOOD[:place] + letter + GOOD[place + 1 :]
    if changed != GOOD:
        with pytest.raises(TokenRefused):
            VERIFIER.verify(changed)


def test_a_refusal_never_shows_the_token() -> None:
    for text in (*FORGERIES.values(), *MISSHAPEN.values()):
        with pytest.raises(TokenRefused) as refused:
            VERIFIER.verify(text)
        assert not any(len(part) > 20 and part in repr(refused.value) for part in text.split("."))


def test_the_younger_key_signs_once_its_time_has_come_and_the_older_still_verifies() -> None:
    clock = Clock()
    old, new = signing_key("old", NOW - 1_000, NOW + 1_060), signing_key("new", NOW + 100)
    both = tokens(old, new, clock=clock)
    before = both.issue(WHO)
    assert both.ring.signer(NOW) == old
    assert [key["kid"] for key in both.document()["keys"]] == ["old", "new"]
    clock.now = NOW + 100
    assert jwt.get_unverified_header(both.issue(WHO))["kid"] == "new"
    assert both.verify(before)
    clock.now = NOW + 1_060
    with pytest.raises(UnknownTokenKey):
        both.verify(before)
    assert [key["kid"] for key in both.document()["keys"]] == ["new"]


def test_when_the_signing_key_was_retired_the_next_one_signs_before_its_time() -> None:
    ring = KeyRing((signing_key("old", NOW - 10, NOW), signing_key("next", NOW + 60), signing_key("later", NOW + 90)))
    signer = ring.signer(NOW)
    assert signer is not None
    assert signer.kid == "next"


def test_one_keys_signature_does_not_hold_under_the_others_name() -> None:
    other = signing_key("k2")
    both = tokens(KEY, other)
    assert both.verify(signed({**HEADER, "kid": "k2"}, own_claims(), other.private, "ES256"))
    with pytest.raises(TokenRefused):
        both.verify(signed({**HEADER, "kid": "k2"}, own_claims(), KEY.private, "ES256"))


def test_without_a_key_no_token_can_be_made() -> None:
    with pytest.raises(TokensUnavailable):
        tokens().issue(WHO)


@pytest.mark.parametrize(
    ("issuer", "audience", "life"), [("", "a", 900), ("i", "", 900), ("i", "a", 901), ("i", "a", 0)]
)
def test_tokens_without_an_issuer_or_that_live_too_long_cannot_be_set_up(issuer: str, audience: str, life: int) -> None:
    with pytest.raises(ValueError, match="access tokens need"):
        Tokens(issuer, audience, lifetime_s=life)


def test_the_unproven_issuer_only_chooses_who_is_asked() -> None:
    assert looks_own(GOOD, ISSUER)
    assert not looks_own(made(iss="https://other.example"), ISSUER)
    assert not looks_own(made(iss=[ISSUER]), ISSUER)
