"""The form of an API key: what is made parses, what is changed does not, and nothing in it can be guessed or logged."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounts import keys


def bearer(text: str) -> bytes:
    return f"Bearer {text}".encode()


def test_a_minted_key_has_the_contract_s_form() -> None:
    made = keys.mint()
    assert re.fullmatch(keys.SCANNER_PATTERN, made.text)
    assert len(made.text) == 67
    body, _, check = made.text.rpartition("_")
    assert check == keys.checksum(body.encode())


def test_a_minted_key_parses_to_its_parts() -> None:
    made = keys.mint()
    presented = keys.parse(bearer(made.text))
    assert (presented.id, presented.secret, presented.text) == (made.id, made.secret, made.text.encode())


def test_minted_keys_differ() -> None:
    assert len({keys.mint().secret for _ in range(200)}) == 200


@given(st.integers(0, 66), st.sampled_from(keys.ALPHABET))
def test_one_wrong_character_is_found_before_any_lookup(position: int, char: str) -> None:
    text = "tg_live_0Aa1Bb2C_" + "k" * 43
    text += "_" + keys.checksum(text.encode())
    changed = text[:position] + char + text[position + 1 :]
    if changed == text:
        assert keys.parse(bearer(text)).id == "0Aa1Bb2C"
    else:
        with pytest.raises(keys.MalformedKey):
            keys.parse(bearer(changed))


@given(st.text(alphabet=keys.ALPHABET, min_size=57, max_size=57))
def test_random_text_of_the_right_form_fails_the_checksum(text: str) -> None:
    with pytest.raises(keys.MalformedKey):
        keys.parse(bearer(f"tg_live_{text[:8]}_{text[8:51]}_{text[51:]}"))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_as_missing_or_malformed(header: bytes) -> None:
    for candidate in (header, b"Bearer " + header):
        with pytest.raises((keys.MissingKey, keys.MalformedKey)):
            keys.parse(candidate)


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER   ", "bEaReR "])
def test_the_scheme_s_case_and_spaces_do_not_matter(scheme: str) -> None:
    made = keys.mint()
    assert keys.parse(scheme.encode() + made.text.encode() + b"  ").id == made.id


@pytest.mark.parametrize("header", [b"", b"Bearer", b"Bearer ", b"Bearer   ", b"Basic dXNlcjpwdw==", b"Token tg_x"])
def test_a_header_without_a_bearer_token_is_a_missing_key(header: bytes) -> None:
    with pytest.raises(keys.MissingKey):
        keys.parse(header)


@pytest.mark.parametrize(
    "text",
    [
        "'; DROP TABLE api_key; --",
        '" OR "1"="1',
        "tg_live_'''''''''_" + "'" * 43 + "_000000",
        "sk-" + "a" * 48,
        "a" * 10_240,
        "tg_live_" + "\x00" * 59,
        "{VALID}\x00",
        "{VALID}'",
        "{VALID}\n",
        "{VALID} {VALID}",
        "{VALID}" + "x" * 200,
        " tg_live_ 00000000",
    ],
)
def test_hostile_tokens_are_malformed(text: str) -> None:
    with pytest.raises(keys.MalformedKey):
        keys.parse(bearer(text.replace("{VALID}", keys.mint().text)))


def test_a_secret_shows_in_no_repr() -> None:
    made = keys.mint()
    presented = keys.parse(bearer(made.text))
    assert made.secret.decode() not in repr(made) + repr(presented) + str(presented)


def test_the_stored_digest_depends_on_pepper_and_secret() -> None:
    assert keys.mac_of(b"p1", b"s") != keys.mac_of(b"p2", b"s")
    assert keys.mac_of(b"p1", b"s") != keys.mac_of(b"p1", b"t")
    # RFC 4231, test case 2
    assert keys.mac_of(b"Jefe", b"what do ya want for nothing?").hex() == (
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    )


def test_a_fingerprint_tells_peppers_apart() -> None:
    assert keys.fingerprint(b"one") == keys.fingerprint(b"one")
    assert keys.fingerprint(b"one") != keys.fingerprint(b"two")
    assert len(keys.fingerprint(b"one")) == 16
