"""SigV4 against AWS's published test suite, and what a request to Bedrock is signed with."""

from __future__ import annotations

import hashlib

import pytest

from providers.sigv4 import Credentials, Unsigned, canonical_request, signing_headers

KEY = Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
TIME = 1_440_938_160  # 2015-08-30 12:36:00 UTC
HOST = (b"Host", b"example.amazonaws.com")
FORM = (b"Content-Type", b"application/x-www-form-urlencoded")
UNRESERVED = b"-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TOKEN = "6e86291e8372ff2a2260956d9b8aae1d763fbf315fa00fa31553b73ebf194267"


def signed(request: Unsigned, credentials: Credentials = KEY) -> dict[bytes, bytes]:
    return dict(signing_headers(request, credentials, region="us-east-1", service="service", epoch_s=TIME))


@pytest.mark.parametrize(
    ("name", "request_", "signature"),
    [
        (
            "get-vanilla",
            Unsigned(b"GET", b"/", (HOST,), b""),
            "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ),
        (
            "get-vanilla-query-order-key-case",
            Unsigned(b"GET", b"/?Param2=value2&Param1=value1", (HOST,), b""),
            "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
        ),
        (
            "get-utf8",
            Unsigned(b"GET", "/\u1234".encode(), (HOST,), b""),
            "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85",
        ),
        (
            "get-unreserved",
            Unsigned(b"GET", b"/" + UNRESERVED, (HOST,), b""),
            "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f",
        ),
        (
            "get-header-value-trim",
            Unsigned(b"GET", b"/", (HOST, (b"My-Header1", b" value1"), (b"My-Header2", b' "a   b   c"')), b""),
            "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736",
        ),
        (
            "post-vanilla",
            Unsigned(b"POST", b"/", (HOST,), b""),
            "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
        ),
        (
            "post-vanilla-query",
            Unsigned(b"POST", b"/?Param1=value1", (HOST,), b""),
            "28038455d6de14eafc1f9222cf5aa6f1a96197d7deb8263271d420d138af7f11",
        ),
        (
            "post-x-www-form-urlencoded",
            Unsigned(b"POST", b"/", (FORM, HOST), b"Param1=value1"),
            "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a",
        ),
    ],
)
def test_the_published_signatures_come_out(name: str, request_: Unsigned, signature: str) -> None:
    names = b";".join(sorted({header.lower() for header, _ in request_.headers} | {b"x-amz-date"})).decode()
    assert signed(request_) == {
        b"x-amz-date": b"20150830T123600Z",
        b"authorization": (
            "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, "
            f"SignedHeaders={names}, Signature={signature}"
        ).encode(),
    }


def test_a_session_token_is_sent_and_signed() -> None:
    headers = signed(Unsigned(b"GET", b"/", (HOST,), b""), Credentials(KEY.access_key_id, KEY.secret, TOKEN))
    assert headers[b"x-amz-security-token"] == TOKEN.encode()
    assert headers[b"authorization"].endswith(
        b"SignedHeaders=host;x-amz-date;x-amz-security-token, "
        b"Signature=07ec1639c89043aa0e3e2de82b96708f198cceab042d4a97044c66dd9f74e7f8"
    )


def test_an_encoded_path_is_encoded_once_more() -> None:
    target = b"/model/us.amazon.nova-micro-v1%3A0/converse"
    names, text = canonical_request(Unsigned(b"POST", target, (HOST,), b"{}"), ())
    assert names == b"host"
    assert text.split(b"\n") == [
        b"POST",
        b"/model/us.amazon.nova-micro-v1%253A0/converse",
        b"",
        b"host:example.amazonaws.com",
        b"",
        b"host",
        hashlib.sha256(b"{}").hexdigest().encode(),
    ]


def test_every_part_of_the_request_changes_the_signature() -> None:
    requests = [
        Unsigned(b"POST", b"/a", (HOST,), b"1"),
        Unsigned(b"PUT", b"/a", (HOST,), b"1"),
        Unsigned(b"POST", b"/b", (HOST,), b"1"),
        Unsigned(b"POST", b"/a?b", (HOST,), b"1"),
        Unsigned(b"POST", b"/a", ((b"host", b"other"),), b"1"),
        Unsigned(b"POST", b"/a", (HOST,), b"2"),
    ]
    assert len({signed(request)[b"authorization"] for request in requests}) == len(requests)


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("AKIA1:se/cr+et", ("AKIA1", "se/cr+et", None)),
        ("ASIA1:secret:to/ken==", ("ASIA1", "secret", "to/ken==")),
        ("ABSKQmVkcm9ja0FQSUtleQ==", None),
        ("AKIA1:", None),
        (":secret", None),
        ("a:b:c:d", None),
        ("", None),
    ],
)
def test_credentials_are_told_from_bearer_keys(key: str, parts: tuple[str, str, str | None] | None) -> None:
    assert Credentials.read(key) == (None if parts is None else Credentials(*parts))


def test_a_secret_is_not_shown() -> None:
    assert "s3cr3t" not in repr(Credentials("AKIA1", "s3cr3t", "s3cr3t"))
