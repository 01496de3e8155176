"""Requests that nobody should send: each gets one answer in OpenAI's form and costs nothing."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from accounts import keys
from tests.support.gateway import Gateway, Key, until
from tests.support.strict_client import Answer, connected, stream_of

GRANT = 1_000_000
BODY_MAX = 1_048_576  # as in the acceptance configuration
ASK: list[Any] = [{"role": "user", "content": "hi"}]
PATH = "/v1/chat/completions"


def chat(**more: Any) -> bytes:
    return json.dumps({"model": "gpt-4o-mini", "messages": ASK, **more}).encode()


def with_member(text: str) -> bytes:
    """A good body with a further root member, written by hand."""
    return b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"hi"}],%b}' % text.encode()


def saying(content: str) -> bytes:
    """A body whose one message has this JSON as content."""
    return b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":%b}]}' % content.encode()


async def refused(gateway: Gateway, key: Key, body: bytes, **headers: str) -> tuple[int, str | None, str | None]:
    """Status, code and param of the error; nothing is held or charged, and the connection goes on."""
    async with connected(gateway.port) as client:
        answer = await client.chat(key.text, body, **headers)
        assert (await client.request("GET", "/health/live")).status == 200
    error = answer.error()
    assert error["type"] == "invalid_request_error"
    assert "x-tollgate-session" not in answer.headers
    balance = await gateway.balance(key)
    assert (balance.available, balance.held, balance.sessions) == (GRANT, 0, 0)
    return answer.status, error["code"], error["param"]


NOT_JSON = {
    "nothing but a space": b" ",
    "text": b"hello",
    "half": b'{"model":"gpt-4o-mini","messages":[',
    "an array": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "a number": b"1e999",
    "two objects": chat() + chat(),
    "a trailing comma": b'{"model":"gpt-4o-mini",}',
    "single quotes": b"{'model':'x'}",
    "a comment": b"/* */" + chat(),
    "a byte order mark": b"\xef\xbb\xbf" + chat(),
    "UTF-16": chat().decode().encode("utf-16"),
    "bytes that are no UTF-8": saying('"\xff"').decode().encode("latin-1"),
    "a bare control character": saying('"a\nb"'),
    "a NUL after the body": chat() + b"\0",
    "NaN": with_member('"temperature":NaN'),
    "Infinity": with_member('"temperature":Infinity'),
    "-Infinity": with_member('"max_tokens":-Infinity'),
    "NaN deep inside": with_member('"metadata":{"a":[NaN]}'),
    "a leading zero": with_member('"seed":01'),
    "arrays 100,000 deep": with_member('"x":' + "[" * 100_000 + "]" * 100_000),
    "objects 129 deep": with_member('"x":' + '{"a":' * 128 + "1" + "}" * 128),
    "unclosed arrays": b"[" * 200_000,
}


@pytest.mark.parametrize("name", NOT_JSON)
async def test_what_is_not_json_is_refused(gateway: Gateway, key: Key, name: str) -> None:
    assert await refused(gateway, key, NOT_JSON[name]) == (400, None, None)


async def test_an_empty_body_is_refused(gateway: Gateway, key: Key) -> None:
    assert await refused(gateway, key, b"") == (400, None, None)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/x-www-form-urlencoded", b"model=gpt-4o-mini&messages=hi"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\ny\r\n--x--\r\n',
        ),
        ("text/html", b"<html></html>"),
    ],
)
async def test_other_content_is_refused(gateway: Gateway, key: Key, content_type: str, body: bytes) -> None:
    assert await refused(gateway, key, body, content_type=content_type) == (400, None, None)


VALUES: dict[str, tuple[bytes, str, str | None]] = {
    **{f"max_tokens {text}": (with_member(f'"max_tokens":{text}'), "invalid_value", "max_tokens")
       for text in ("-1", "0", "1e308", '"5"', "true", "1" + "0" * 30, "2147483648", "1.5", "[]", "{}")},
    **{f"max_completion_tokens {text}": (with_member(f'"max_completion_tokens":{text}'), "invalid_value",
                                         "max_completion_tokens") for text in ("-1", "1e308", '"5"', "true")},
    **{f"n {text}": (with_member(f'"n":{text}'), "invalid_value", "n")
       for text in ("1000000000", "0", "-1", "18446744073709551615", "1" + "0" * 30, "true", '"1"', "129")},
    "stream as text": (with_member('"stream":"yes"'), "invalid_value", "stream"),
    "stream_options as a number": (with_member('"stream":true,"stream_options":1'), "invalid_value", "stream_options"),
    "include_usage as text": (
        with_member('"stream":true,"stream_options":{"include_usage":"1"}'),
        "invalid_value",
        "stream_options.include_usage",
    ),
    "stream_options without stream": (
        with_member('"stream_options":{"include_usage":true}'), "invalid_value", "stream_options"
    ),
    "tools as an object": (with_member('"tools":{}'), "invalid_value", "tools"),
    "no messages": (b'{"model":"gpt-4o-mini"}', "invalid_value", "messages"),
    "messages null": (b'{"model":"gpt-4o-mini","messages":null}', "invalid_value", "messages"),
    "messages empty": (b'{"model":"gpt-4o-mini","messages":[]}', "invalid_value", "messages"),
    "messages as text": (b'{"model":"gpt-4o-mini","messages":"hi"}', "invalid_value", "messages"),
    "messages of text": (b'{"model":"gpt-4o-mini","messages":["hi"]}', "invalid_value", "messages"),
    "messages of lists": (b'{"model":"gpt-4o-mini","messages":[[[]]]}', "invalid_value", "messages"),
    "no model": (b'{"messages":[{"role":"user","content":"hi"}]}', "invalid_value", "model"),
    "model null": (b'{"model":null,"messages":[{"role":"user","content":"hi"}]}', "invalid_value", "model"),
    "model a number": (b'{"model":4,"messages":[{"role":"user","content":"hi"}]}', "invalid_value", "model"),
    **{f"{name} at the root": (with_member(f'"{name}":"http://evil/"'), "unsupported_parameter", name)
       for name in ("api_base", "base_url", "api_key", "extra_headers", "extra_body")},
    "an escaped api_base": (with_member('"api\\u005fbase":"http://evil/"'), "unsupported_parameter", "api_base"),
    **{f"{name} twice": (with_member(f'"{name}":{one},"{name}":{two}'), "invalid_value", name)
       for name, one, two in (("max_tokens", "1", "9e9"), ("n", "1", "128"), ("stream", "false", "true"))},
    "model twice": (with_member('"model":"sim-401"'), "invalid_value", "model"),
    "messages twice": (with_member('"messages":[]'), "invalid_value", "messages"),
    "model twice, once escaped": (with_member('"mo\\u0064el":"sim-401"'), "invalid_value", "model"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
async def test_a_bad_value_is_refused_with_its_fields_name(gateway: Gateway, key: Key, name: str) -> None:
    body, code, param = VALUES[name]
    assert await refused(gateway, key, body) == (400, code, param)


@pytest.mark.parametrize(
    "model",
    ["", "nope", "GPT-4o-mini", "gpt-4o-mini ", "../gpt-4o-mini", "gpt-4\u043e-mini", "*", "a\r\nx-evil: 1", "\0",
     "x" * 10_000, "\u202e", "gpt-4o-mini\n", "sim/gpt-4o-mini", "'; DROP TABLE account; --"],
)  # fmt: skip
async def test_a_model_that_is_not_exactly_a_route_is_not_found(gateway: Gateway, key: Key, model: str) -> None:
    assert await refused(gateway, key, chat(model=model)) == (404, "model_not_found", None)


CONTENTS = ("7", "null", "true", "[[[]]]", '[{"type":"text"}]', '[{"type":"text","text":7}]', "{}", '"a\\u0000b"', '""')


@pytest.mark.parametrize("content", CONTENTS)
async def test_odd_content_is_the_providers_to_judge_and_never_a_fault_of_ours(
    gateway: Gateway, key: Key, content: str
) -> None:
    async with connected(gateway.port) as client:
        answer = await client.chat(key.text, saying(content))
    assert answer.status in (200, 400)
    if answer.status == 400:
        answer.error()
    balance = await gateway.idle(key)
    assert balance.available == GRANT - balance.charged


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("content", ['"\\ud800"', '"a\\udc00b"', '[{"type":"text","text":"\\ud83d"}]'])
async def test_a_lone_surrogate_is_refused(gateway: Gateway, key: Key, content: str, stream: bool) -> None:
    body = saying(content)[:-1] + (b',"stream":true}' if stream else b"}")
    status, _, _ = await refused(gateway, key, body)
    assert status == 400


@pytest.mark.parametrize("name", ["api_base", "base_url", "api_key", "extra_headers", "extra_body"])
async def test_an_upstream_address_below_the_root_passes_and_changes_nothing(
    gateway: Gateway, key: Key, name: str
) -> None:
    more = {"metadata": {name: "http://127.0.0.1:9/"}, "zz": {name: [{name: "x"}]}}
    async with connected(gateway.port) as client:
        answer = await client.chat(key.text, chat(model="gpt-4o-mini", stream=True, max_tokens=5, **more))
    assert stream_of(answer, usage_wanted=False).text()
    entry = await gateway.served(answer.request_id)
    async with httpx2.AsyncClient(verify=False) as provider:
        seen = (await provider.get(f"{gateway.provider}/__requests/{entry['n']}/body")).json()
    assert {field: seen[field] for field in more} == more


def head(key: Key, framing: str) -> bytes:
    return f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key.text}\r\n{framing}\r\n\r\n".encode()


async def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(gateway: Gateway, key: Key) -> None:
    async with connected(gateway.port) as client:
        await client.send(head(key, f"content-length: {BODY_MAX + 1}"))
        answer = await client.answer()
        assert await client.rest() == b""
    assert (answer.status, answer.error()["code"]) == (413, "request_too_large")
    assert (await gateway.balance(key)).available == GRANT


@pytest.mark.parametrize("announced", ["9" * 18, "9" * 40])
async def test_absurd_lengths_are_refused(gateway: Gateway, key: Key, announced: str) -> None:
    async with connected(gateway.port) as client:
        await client.send(head(key, f"content-length: {announced}"))
        answer = await client.answer()
        assert await client.rest() == b""
    answer.error()
    assert answer.status in (400, 413)


async def test_a_chunked_body_is_refused_where_it_becomes_too_large(gateway: Gateway, key: Key) -> None:
    async with connected(gateway.port) as client:
        await client.send(head(key, "transfer-encoding: chunked"))
        for _ in range(BODY_MAX // 65_536 + 1):
            await client.send(b"10000\r\n" + b" " * 65_536 + b"\r\n")
        answer = await client.answer()
        assert await client.rest() == b""
    assert (answer.status, answer.error()["code"]) == (413, "request_too_large")


async def test_a_body_of_the_greatest_size_is_read(gateway: Gateway, key: Key) -> None:
    body = chat(max_tokens=1)
    assert (await call(gateway, "POST", PATH, key.text, body + b" " * (BODY_MAX - len(body)))).status == 200


async def call(gateway: Gateway, method: str, path: str, key: str | None = None, body: bytes = b"") -> Answer:
    async with connected(gateway.port) as client:
        return await client.request(method, path, key, body)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/foo"), ("GET", "/v1/foo"), ("GET", "/v1"), ("GET", "/"), ("DELETE", "/v1/models"),
        ("POST", "/v1/models"),
        ("GET", PATH), ("PUT", PATH), ("DELETE", PATH), ("PATCH", PATH), ("OPTIONS", PATH), ("OPTIONS", "/v1/models"),
        ("OPTIONS", "/v1/models/gpt-4o-mini"), ("POST", "/v1/embeddings"), ("POST", "/v1/responses"),
        ("POST", "/V1/chat/completions"), ("POST", "/v1/chat"), ("GET", "/schema"), ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("TRACE", "/v1/models"), ("PROPFIND", "/v1/models"),
    ],
)  # fmt: skip
async def test_unknown_urls_and_methods_get_openais_404(gateway: Gateway, key: Key, method: str, path: str) -> None:
    answer = await call(gateway, method, path, key.text)
    assert answer.status == 404
    assert answer.error() == {
        "message": f"Invalid URL ({method} {path})",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }


@pytest.mark.parametrize("path", [PATH, "/v1/models", "/v1/foo"])
async def test_head_is_answered_without_a_body(gateway: Gateway, key: Key, path: str) -> None:
    async with connected(gateway.port) as client:
        answer = await client.request("HEAD", path, key.text)
        after = await client.request("GET", "/v1/models", key.text)
    assert (answer.status, after.status) == (404, 200)
    assert answer.request_id


@pytest.mark.parametrize(
    "path", ["/v1/%", "/v1/%zz", "/v1/%ff%fe", "/v1/%00", "/v1/models/%", "/v1/models/%e2%80%ae", "/v1/models/a%0d%0ab",
             "/v1/models/..%2f..%2fetc", "/v1/%2e%2e/health", "/v1/models/" + "x" * 8_000, "/v1/models/%ed%a0%80"],
)  # fmt: skip
async def test_broken_paths_are_not_found(gateway: Gateway, key: Key, path: str) -> None:
    answer = await call(gateway, "GET", path, key.text)
    assert answer.status == 404
    answer.error()


@pytest.mark.parametrize("path", ["/v1/models/\xff", "/v1/m\x01", "v1/models", "/v1/models\x7f"])
async def test_bytes_that_no_url_has_get_one_answer(gateway: Gateway, key: Key, path: str) -> None:
    answer = await call(gateway, "GET", path, key.text)
    answer.error()
    assert answer.status in (400, 404)


def wrong_secret(key: Key) -> str:
    """A key of the right form and checksum with another secret."""
    other = keys.mint()
    body = f"tg_live_{key.id}_{other.secret.decode()}"
    return f"{body}_{keys.checksum(body.encode())}"


async def answered(gateway: Gateway, authorization: str | None) -> tuple[int, str | None]:
    """Status and code of a chat call with this header."""
    headers = {} if authorization is None else {"authorization": authorization}
    async with connected(gateway.port) as client:
        answer = await client.request("POST", PATH, None, chat(), **headers)
    return answer.status, answer.error()["code"]


async def test_keys_that_are_not_accepted_are_401(gateway: Gateway, key: Key) -> None:
    last = key.text[-1]
    assert await answered(gateway, None) == (401, None)
    assert await answered(gateway, "Bearer ") == (401, None)
    assert await answered(gateway, "Basic dXNlcjpwYXNz") == (401, None)
    for text in (key.text[:-1] + ("a" if last != "a" else "b"), key.text[:-1], key.text + "0", key.text.upper(),
                 keys.mint().text, wrong_secret(key), "sk-1234567890", "x", f"{key.text} {key.text}"):  # fmt: skip
        assert await answered(gateway, f"Bearer {text}") == (401, "invalid_api_key")
    async with gateway.stores() as stores:
        await stores.pool.execute("UPDATE api_key SET revoked_at = now() WHERE id = $1", key.id)
        await stores.redis.call("DEL", f"auth:{key.id}")
    assert await answered(gateway, f"Bearer {key.text}") == (401, "invalid_api_key")


FUZZ = ("' OR 1=1 --", '"', "\\", "%00", "tg_live_", "tg_live_" + "'" * 8 + "_" + "a" * 43 + "_aaaaaa", "a" * 10_000,
        "\xff\xfe\xfd", "${jndi:ldap://x}", "tg_live_../../../_x_y", "{}", "null", "Bearer x", ",", "\t",
        "=" * 255)  # fmt: skip


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "Bearer  ", "", "Token "])
@pytest.mark.parametrize("value", FUZZ)
async def test_no_authorization_header_gets_anything_but_a_401(gateway: Gateway, scheme: str, value: str) -> None:
    status, code = await answered(gateway, scheme + value)
    assert (status, code) in ((401, None), (401, "invalid_api_key"))


async def test_a_wrong_checksum_touches_no_store(gateway: Gateway) -> None:
    """Keys with a right checksum and an unknown id, asked for last, are the first that either store hears of."""
    bad = [each.text[:-1] + ("0" if each.text[-1] != "0" else "1") for each in (keys.mint() for _ in range(50))]
    seen = "SELECT coalesce(seq_scan, 0) + coalesce(idx_scan, 0) FROM pg_stat_user_tables WHERE relname = 'api_key'"
    async with gateway.stores() as stores:
        await stores.redis.call("CONFIG", "RESETSTAT")
        before = await stores.pool.fetchval(seen)
        for text in bad:
            assert await answered(gateway, f"Bearer {text}") == (401, "invalid_api_key")
        stats = (await stores.redis.call("INFO", "commandstats")).decode()
        gets = [line for line in stats.splitlines() if line.startswith("cmdstat_get:")]
        assert all(int(line.split("calls=")[1].split(",")[0]) < len(bad) for line in gets)

        async def counted() -> int | None:
            # Postgres publishes a connection's counts when its next statement comes a second later, or after ten.
            assert await answered(gateway, f"Bearer {keys.mint().text}") == (401, "invalid_api_key")
            return await _grown(stores.pool, seen, before)

        after = await until(counted, every=0.25)
        assert after - before < len(bad)


async def _grown(pool: Any, query: str, before: int) -> int | None:
    """The counter, once it is above `before`."""
    now: int = await pool.fetchval(query)
    return now if now > before else None
