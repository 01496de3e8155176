"""Reading a chat request: what is taken, what is refused, and that nothing else of the body changes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from config.settings import Bounds
from proxy.errors import CallError, InvalidBody, InvalidValue, UnsupportedParameter
from proxy.request import ChatRequest, read_chat

MESSAGES = [{"role": "user", "content": "hi"}]


def read(**fields: Any) -> ChatRequest:
    return read_chat(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode(), Bounds())


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [-1, 0, 1e308, "5", True, 2**31, 10**30, [1], 1.5])
def test_absurd_limits_name_the_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidValue) as caught:
        read(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("value", [0, -1, 10**9, "2", True, 1.5])
def test_absurd_n_is_refused(value: Any) -> None:
    with pytest.raises(InvalidValue) as caught:
        read(n=value)
    assert caught.value.param == "n"


@pytest.mark.parametrize("name", ["api_base", "base_url", "api_key", "extra_headers", "extra_body"])
def test_fields_that_would_steer_the_upstream_are_refused_at_the_root_and_pass_below(name: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        read(**{name: "http://evil"})
    assert caught.value.param == name
    nested = read(metadata={name: "x"}, other={name: 1})
    assert nested.root.raw("metadata") == json.dumps({name: "x"}).encode()


@pytest.mark.parametrize("name", ["model", "messages", "stream", "max_tokens", "n", "stream_options", "tools"])
def test_a_doubled_field_that_is_read_is_refused(name: str) -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}],"stream":false,"max_tokens":1,'
    body += b'"n":1,"stream_options":null,"tools":[]'
    with pytest.raises(InvalidValue) as caught:
        read_chat(body + b',"%b":9}' % name.encode(), Bounds())
    assert caught.value.param == name


def test_a_doubled_field_that_is_not_read_passes() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}],"zz":1,"zz":2}'
    assert (
        read_chat(body, Bounds()).upstream_body("m", include_usage=False, output_limit=None, limit_field=None) == body
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"messages":[{"role":"user"}]}', "model"),
        (b'{"model":"m"}', "messages"),
        (b'{"model":"m","messages":[]}', "messages"),
        (b'{"model":"m","messages":["x"]}', "messages"),
        (b'{"model":"m","messages":"x"}', "messages"),
        (b'{"model":5,"messages":[{}]}', "model"),
        (b'{"model":"m","messages":[{}],"stream":"yes"}', "stream"),
        (b'{"model":"m","messages":[{}],"stream_options":{"include_usage":true}}', "stream_options"),
    ],
)
def test_missing_and_mistyped_fields_are_named(body: bytes, param: str) -> None:
    with pytest.raises(CallError) as caught:
        read_chat(body, Bounds())
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body", [b"", b"nope", b"[]", b'{"model":"m","messages":[{}],"temperature":NaN}', b'{"model":"m"']
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidBody):
        read_chat(body, Bounds())


def test_nesting_is_bounded() -> None:
    deep = b'{"model":"m","messages":[{}],"x":' + b"[" * 127 + b"]" * 127 + b"}"
    assert read_chat(deep, Bounds()).model == "m"
    with pytest.raises(InvalidBody):
        read_chat(deep.replace(b"[" * 127 + b"]" * 127, b"[" * 128 + b"]" * 128), Bounds())


def test_only_the_spliced_members_change() -> None:
    body = b'{ "model":"m", "x" : {"deep":[1,2.50,"\\u00e9"]},"messages":[{"role":"user","content":"x"}],'
    body += b'"stream":true,"max_tokens":  9 }'
    request = read_chat(body, Bounds())
    sent = request.upstream_body("real", include_usage=True, output_limit=4, limit_field=None)
    usage = b',"stream_options":{"include_usage":true}}'
    assert sent == body.replace(b'"m"', b'"real"').replace(b"  9", b"  4").replace(b" }", b" " + usage)
    assert request.upstream_body("m", include_usage=False, output_limit=None, limit_field=None) is body


def test_other_stream_options_survive_the_injected_usage() -> None:
    request = read(stream=True, stream_options={"include_obfuscation": False})
    sent = json.loads(request.upstream_body("m", include_usage=True, output_limit=None, limit_field=None))
    assert sent["stream_options"] == {"include_obfuscation": False, "include_usage": True}
    assert not request.usage_wanted


def test_the_smaller_limit_counts_and_both_are_lowered() -> None:
    request = read(max_tokens=9, max_completion_tokens=5)
    assert request.limit == 5
    sent = json.loads(request.upstream_body("m", include_usage=False, output_limit=3, limit_field=None))
    assert (sent["max_tokens"], sent["max_completion_tokens"]) == (3, 3)


def test_a_provider_that_knows_one_limit_field_gets_the_limit_there() -> None:
    request = read(max_completion_tokens=5)
    sent = json.loads(request.upstream_body("m", include_usage=False, output_limit=None, limit_field="max_tokens"))
    assert (sent["max_tokens"], sent["max_completion_tokens"]) == (5, 5)


def sent(request: ChatRequest, model: str = "m", output: int | None = None, field: str | None = None) -> Any:
    return json.loads(request.upstream_body(model, include_usage=False, output_limit=output, limit_field=field))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("limits", [(9, 5), (5, 9)])
@pytest.mark.parametrize("field", [None, "max_tokens", "max_completion_tokens"])
def test_two_limits_that_differ_are_sent_as_the_smaller(
    stream: bool, limits: tuple[int, int], field: str | None
) -> None:
    fields = sent(read(stream=stream, max_tokens=limits[0], max_completion_tokens=limits[1]), field=field)
    assert (fields["max_tokens"], fields["max_completion_tokens"]) == (5, 5)


def test_a_limit_that_is_low_enough_stays_as_it_was_written() -> None:
    request = read(max_tokens=5)
    body = request.upstream_body("m", include_usage=False, output_limit=9, limit_field="max_tokens")
    assert body is request.root.body
    assert sent(read(max_tokens=12), output=9)["max_tokens"] == 9


@pytest.mark.parametrize(
    ("model", "field", "name"),
    [
        ("gpt-4o", None, "max_tokens"),
        ("gpt-5-mini", None, "max_completion_tokens"),
        ("openai/o3", None, "max_completion_tokens"),
        ("gpt-5", "max_tokens", "max_tokens"),
        ("gpt-4o", "max_completion_tokens", "max_completion_tokens"),
        ("gpt-4", "max_tokens", "max_tokens"),
    ],
)
def test_a_held_limit_is_added_in_the_field_that_the_model_takes(model: str, field: str | None, name: str) -> None:
    fields = sent(read(model=model), model, 9_000, field)
    assert fields == {"model": model, "messages": MESSAGES, name: 9_000}
    assert sent(read(model=model, max_tokens=None), model, 9_000, field)[name] == 9_000


@pytest.mark.parametrize(("model", "most"), [("gpt-3.5-turbo", 4096), ("gpt-4-turbo", 4096), ("gpt-4-0613", 8192)])
def test_a_model_that_writes_no_more_than_was_held_gets_no_limit(model: str, most: int) -> None:
    request = read(model=model)
    assert request.upstream_body(model, include_usage=False, output_limit=most, limit_field=None) is request.root.body
    assert sent(request, model, most - 1)["max_tokens"] == most - 1


def test_root_members_are_bounded() -> None:
    body = b'{"model":"m","messages":[{}],"a":1,"a":2}'
    assert read_chat(body, Bounds(root_members_max=4)).model == "m"
    with pytest.raises(InvalidBody):
        read_chat(body, Bounds(root_members_max=3))


def test_the_answers_format_is_read() -> None:
    assert read(response_format={"type": "text"}).response_format == {"type": "text"}
    assert read().response_format is None
    with pytest.raises(InvalidValue):
        read_chat(b'{"model":"m","messages":[{}],"response_format":1,"response_format":2}', Bounds())


@pytest.mark.parametrize(
    ("fields", "audio"),
    [
        ({}, False),
        ({"audio": None, "modalities": ["text"]}, False),
        ({"audio": {"voice": "x"}}, True),
        ({"modalities": ["text", "audio"]}, True),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, True),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, True),
        ({"messages": [{"role": "user", "content": [{"type": [], "text": "input_audio"}, 5]}]}, False),
    ],
)
def test_audio_is_seen_where_it_can_cost(fields: dict[str, Any], audio: bool) -> None:
    assert read(**fields).audio is audio


def test_sizes_are_those_of_the_values_as_sent() -> None:
    request = read_chat(b'{"model" : "m", "messages":[{} ],"x":"\xc3\xa9"}', Bounds())
    assert request.sizes() == {"model": 3, "messages": 5, "x": 4}
