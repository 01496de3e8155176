"""Each script of the simulated provider makes the trouble its name says, on a real socket."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from metering.ranks import encoding
from tests.support.simulated_provider import Answered, Simulated, chat_body, read_until

MODELS_OF_PLAIN_STREAMS = [
    "sim-slow-first:ms=1",
    "sim-slow-headers:ms=1",
    "sim-slow-drip:tokens=3",
    "sim-close-delimited",
    "sim-usage-everywhere",
    "sim-extra-fields",
    "sim-huge-frame:size=3000000",
    "sim-comments",
    "sim-azure",
    "sim-no-role",
    "sim-chars:size=3",
]


@pytest.fixture(scope="module")
def provider() -> Iterator[Simulated]:
    with Simulated.start() as running:
        yield running
        assert running.stop() == 0


def count(said: str) -> int:
    return len(encoding("o200k_base").encode_ordinary(said))


@pytest.mark.parametrize("model", MODELS_OF_PLAIN_STREAMS)
def test_trouble_around_the_text_leaves_the_text_and_its_usage_whole(provider: Simulated, model: str) -> None:
    answered = provider.chat(model, usage=True)
    said, logged = "".join(answered.deltas()), provider.last()
    assert answered.body.endswith(b"data: [DONE]\n\n")
    assert answered.usages()[-1]["completion_tokens"] == count(said) == logged["served_tokens"]
    assert (logged["text"], logged["completed"]) == (said, True)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 504, 529])
@pytest.mark.parametrize("stream", [True, False])
def test_a_status_script_answers_with_openais_error_body(provider: Simulated, status: int, stream: bool) -> None:
    answered = provider.chat(f"sim-{status}", stream=stream)
    assert answered.status == status
    assert list(answered.json()["error"]) == ["message", "type", "param", "code"]
    assert answered.headers["content-type"] == "application/json"
    logged = provider.last()
    assert (logged["status"], logged["served_tokens"], logged["prompt_tokens"], logged["usage_sent"]) == (
        status,
        0,
        0,
        None,
    )


def test_429_says_when_to_come_back(provider: Simulated) -> None:
    assert provider.chat("sim-429").headers["retry-after"] == "7"
    assert provider.chat("sim-429:retry_after=30").headers["retry-after"] == "30"
    assert "retry-after" not in provider.chat("sim-429:retry_after=none").headers
    assert provider.chat("sim-429:code=insufficient_quota").json()["error"]["type"] == "insufficient_quota"
    assert provider.chat("sim-503:retry_after.2").headers["retry-after"] == "2"


def test_context_length_is_refused_by_its_code(provider: Simulated) -> None:
    answered = provider.chat("sim-context-length")
    assert (answered.status, answered.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_fail_times_fails_by_tag_and_then_works(provider: Simulated) -> None:
    statuses = [provider.chat("sim-fail-times:times=2,tag=a").status for _ in range(4)]
    assert statuses == [500, 500, 200, 200]
    assert provider.chat("sim-fail-times:tag=b,status=503").status == 503
    provider.request("DELETE", "/__log")
    assert provider.chat("sim-fail-times:times=2,tag=a").status == 500


def test_html_and_json_come_with_a_200(provider: Simulated) -> None:
    page = provider.chat("sim-html")
    assert (page.status, page.headers["content-type"]) == (200, "text/html")
    body = provider.chat("sim-json-for-stream")
    assert (body.status, body.headers["content-type"]) == (200, "application/json")
    assert "error" in body.json()
    assert provider.chat("sim-json-for-stream:body=completion").json()["object"] == "chat.completion"


def test_an_empty_answer_is_a_200_without_a_byte(provider: Simulated) -> None:
    assert (provider.chat("sim-empty").status, provider.chat("sim-empty").body) == (200, b"")
    assert provider.chat("sim-empty", stream=False).body == b""


def test_bytes_that_are_not_http(provider: Simulated) -> None:
    with pytest.raises(http.client.BadStatusLine):
        provider.chat("sim-not-http")
    assert provider.last()["status"] is None


def partial(provider: Simulated, model: str, **fields: Any) -> tuple[Answered, bool]:
    """What came of a broken answer, and whether the connection was reset."""
    with provider.connect(chat_body(model, **fields)) as raw:
        got, reset = b"", False
        try:
            while more := raw.recv(65536):
                got += more
        except ConnectionResetError:
            reset = True
    head, _, rest = got.partition(b"\r\n\r\n")
    body = re.sub(rb"(?:^|\r\n)[0-9a-f]+\r\n", b"", rest)
    return Answered(int(head[9:12]), {}, body), reset


@pytest.mark.parametrize("after", [0, 1, 3, 20])
@pytest.mark.parametrize("how", ["fin", "rst"])
def test_cut_closes_the_connection_after_some_chunks(provider: Simulated, how: str, after: int) -> None:
    answered, reset = partial(provider, f"sim-cut:after={after},how={how}")
    assert reset == (how == "rst")
    assert b"[DONE]" not in answered.body
    assert len(answered.deltas()) == after or reset
    logged = provider.last()
    assert (logged["completed"], logged["aborted"]) == (False, False)
    assert logged["served_tokens"] == count(logged["text"]) == after


def test_a_cut_call_without_stream_ends_inside_its_body(provider: Simulated) -> None:
    with pytest.raises(http.client.IncompleteRead):
        provider.chat("sim-cut", stream=False)
    with pytest.raises(http.client.IncompleteRead):
        provider.chat("sim-cut:mid=1")
    assert not provider.last()["completed"]


def test_truncate_ends_cleanly_without_finish_and_done(provider: Simulated) -> None:
    answered = provider.chat("sim-truncate:after=5", usage=True)
    assert len(answered.deltas()) == 5
    assert (answered.finishes(), answered.usages()) == ([], [])
    assert not answered.body.endswith(b"[DONE]\n\n")
    assert (provider.last()["served_tokens"], provider.last()["completed"]) == (5, False)


def until_quiet(raw: socket.socket, quiet_s: float) -> bytes:
    """What still arrives before nothing has come for a while; an end of the stream is a failure."""
    got = b""
    raw.settimeout(quiet_s)
    try:
        while more := raw.recv(65536):
            got += more
    except TimeoutError:
        return got
    raise AssertionError("the stream ended")


def test_stall_sends_some_chunks_and_then_nothing(provider: Simulated) -> None:
    with provider.connect(chat_body("sim-stall:after=4")) as raw:
        logged = provider.wait_for(lambda e: e["served_tokens"] == 4)
        assert logged["running"]
        got = read_until(raw, b'"content":" about"')
        got += until_quiet(raw, 0.3)
    assert got.count(b'"content":"') == 5
    assert provider.wait_for(lambda e: not e["running"])["aborted"]


def test_slow_headers_delay_the_status_line_and_slow_first_only_the_content(provider: Simulated) -> None:
    started = time.monotonic()
    with provider.connect(chat_body("sim-slow-headers:ms=300")) as raw:
        assert read_until(raw, b"\r\n\r\n")
        assert time.monotonic() - started >= 0.29
    started = time.monotonic()
    with provider.connect(chat_body("sim-slow-first:ms=400")) as raw:
        early = read_until(raw, b'"role":"assistant"')
        assert b'"content":"You"' not in early
        read_until(raw, b'"content":"You"')
        assert time.monotonic() - started >= 0.39


@pytest.mark.parametrize("kind", ["text", "half", "array", "null", "empty", "binary", "html"])
def test_garbage_is_one_frame_between_good_ones(provider: Simulated, kind: str) -> None:
    body = provider.chat(f"sim-garbage:kind={kind},after=1").body
    parts = body.split(b"\n\n")
    bad = parts[2]
    assert json.loads(parts[1][6:])["choices"][0]["delta"]
    assert json.loads(parts[3][6:])["choices"][0]["delta"]
    assert not bad.startswith(b"data: {") or kind == "half"
    assert body.endswith(b"[DONE]\n\n")
    with pytest.raises(json.JSONDecodeError):
        provider.chat("sim-garbage", stream=False).json()


@pytest.mark.parametrize("after", [0, 2])
def test_in_band_errors_of_three_kinds(provider: Simulated, after: int) -> None:
    plain = provider.chat(f"sim-error-frame:after={after},code=rate_limit_exceeded")
    assert plain.frames()[-1]["error"]["code"] == "rate_limit_exceeded"
    assert len(plain.frames()) == (3 if after else 0) + 1
    assert plain.body.endswith(b"data: [DONE]\n\n")
    assert b"[DONE]" not in provider.chat(f"sim-error-frame:after={after},done=0").body
    event = provider.chat(f"sim-event-error:after={after}")
    assert b'event: error\ndata: {"type":"error"' in event.body
    router = provider.chat(f"sim-finish-error:after={after}").frames()[-1]
    assert (router["error"]["code"], router["choices"][0]["finish_reason"]) == (502, "error")
    assert not provider.last()["completed"]
    assert "error" in provider.chat("sim-error-frame", stream=False).json()


def test_the_sdk_sees_an_in_band_error_as_one(provider: Simulated) -> None:
    with openai.OpenAI(base_url=provider.base_url, api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="sim-error-frame", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        with pytest.raises(openai.APIError, match="had an error"):
            list(stream)


def test_no_usage_is_sent_even_when_asked(provider: Simulated) -> None:
    assert b'"usage"' not in provider.chat("sim-no-usage", usage=True).body
    assert "usage" not in provider.chat("sim-no-usage", stream=False).json()
    assert provider.last()["usage_sent"] is None
    assert provider.last()["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        ("big", lambda true, sent: sent[-1]["completion_tokens"] == true * 10 + 1000),
        ("small", lambda true, sent: sent[-1]["completion_tokens"] == true // 2),
        ("negative", lambda true, sent: sent[-1]["completion_tokens"] == -7),
        ("huge", lambda true, sent: sent[-1]["completion_tokens"] == 10**18),
        ("two", lambda true, sent: [u["completion_tokens"] for u in sent] == [true + 50, true]),
        ("string", lambda true, sent: sent[-1]["completion_tokens"] == "84"),
        ("float", lambda true, sent: sent[-1]["completion_tokens"] == 84.5),
        ("boolean", lambda true, sent: sent[-1]["completion_tokens"] is True),
        ("null", lambda true, sent: sent[-1]["completion_tokens"] is None),
        ("cached", lambda true, sent: sent[-1]["prompt_tokens_details"]["cached_tokens"] > sent[-1]["prompt_tokens"]),
        ("reasoning", lambda true, sent: sent[-1]["completion_tokens_details"]["reasoning_tokens"] == true + 1000),
        ("empty", lambda true, sent: sent == [{}]),
    ],
)
def test_wrong_usage_is_wrong_in_a_chosen_way(provider: Simulated, kind: str, seen: Any) -> None:
    answered = provider.chat(f"sim-wrong-usage:kind={kind}", usage=True)
    logged = provider.last()
    assert seen(count(logged["text"]), answered.usages())
    assert logged["completion_tokens"] == count(logged["text"])
    assert logged["usage_sent"] == answered.usages()[-1]


def test_usage_may_be_zero_on_the_finish_chunk_or_in_every_chunk(provider: Simulated) -> None:
    assert provider.chat("sim-zero-usage", usage=True).usages()[0]["total_tokens"] == 0
    finish = provider.chat("sim-usage-on-finish")
    assert [f["usage"]["completion_tokens"] for f in finish.frames() if f["choices"][0]["finish_reason"]] == [
        count("".join(finish.deltas()))
    ]
    everywhere = provider.chat("sim-usage-everywhere", "[[say=one two three]]").usages()
    assert [usage["completion_tokens"] for usage in everywhere] == [0, 1, 2, 3, 3, 3]


def test_cached_tokens_are_part_of_the_prompt(provider: Simulated) -> None:
    usage = provider.chat("sim-cached:count=3", usage=True).usages()[0]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3
    assert usage["prompt_tokens"] == provider.last()["prompt_tokens"] > 3


def test_frames_without_an_ending_or_a_beginning(provider: Simulated) -> None:
    assert b"[DONE]" not in provider.chat("sim-no-done").body
    finishless = provider.chat("sim-no-finish")
    assert finishless.finishes() == []
    assert b"[DONE]" in finishless.body
    assert b'"role"' not in provider.chat("sim-no-role").body
    first = provider.chat("sim-azure").frames()[0]
    assert (first["choices"], first["id"]) == ([], "")
    assert max(len(line) for line in provider.chat("sim-huge-frame:size=2000000").body.split(b"\n")) > 2_000_000


def test_line_ends_and_lines_that_are_legal_sse(provider: Simulated) -> None:
    plain = provider.chat("gpt-4o").body
    crlf = provider.chat("sim-crlf").body
    assert crlf.count(b"\r\n") == crlf.count(b"\n") == plain.count(b"\n")
    assert b"\n" not in provider.chat("sim-cr").body
    assert b"data: " not in provider.chat("sim-no-space", "[[say=x]]").body
    ids = provider.chat("sim-id-lines").body
    assert all(mark in ids for mark in (b"id: 0\n", b"retry: 1000\n\n", b"event: ping\n\n", b"\n\n: still here\n\n"))
    assert provider.chat("sim-comments").body.startswith(b": OPENROUTER PROCESSING\n\n")
    both = provider.chat("sim-comments+crlf+no-done:tokens=4").body
    assert both.startswith(b": OPENROUTER PROCESSING\r\n\r\n")
    assert b"[DONE]" not in both


def test_reasoning_comes_first_and_counts(provider: Simulated) -> None:
    answered = provider.chat("sim-reasoning:think=25", usage=True)
    usage = answered.usages()[0]
    thought, said = "".join(answered.deltas("reasoning_content")), "".join(answered.deltas())
    assert usage["completion_tokens_details"]["reasoning_tokens"] == count(thought) == 25
    assert usage["completion_tokens"] == 25 + count(said)
    assert provider.chat("sim-reasoning:field=reasoning").deltas("reasoning")
    hidden = provider.chat("sim-reasoning:think=25,hidden=1", usage=True)
    assert b"reasoning_content" not in hidden.body
    assert hidden.usages()[0]["completion_tokens"] == 25 + count("".join(hidden.deltas()))
    cut = provider.chat("sim-reasoning:think=25", max_tokens=10, usage=True)
    assert (cut.usages()[0]["completion_tokens"], cut.deltas()) == (10, [])


def test_a_refusal_has_its_own_field_and_counts(provider: Simulated) -> None:
    answered = provider.chat("sim-refusal", usage=True)
    assert answered.deltas() == []
    assert answered.usages()[0]["completion_tokens"] == count("".join(answered.deltas("refusal")))
    assert provider.chat("sim-refusal", stream=False).json()["choices"][0]["message"]["content"] is None


def test_several_tools_are_called_with_and_without_index(provider: Simulated) -> None:
    def calls(model: str) -> list[dict[str, Any]]:
        frames = provider.chat(model, usage=True).frames()
        return [c["delta"]["tool_calls"][0] for f in frames for c in f["choices"] if c["delta"].get("tool_calls")]

    assert {call["index"] for call in calls("sim-parallel-tools:count=3")} == {0, 1, 2}
    logged = provider.last()
    made = logged["choices"][0]["tools"]
    assert logged["usage_sent"]["completion_tokens"] == sum(count(t["name"]) + count(t["arguments"]) for t in made)
    assert all("index" not in call for call in calls("sim-no-tool-index"))
    assert len([call for call in calls("sim-parallel-tools+no-tool-index") if "id" in call]) == 2


@pytest.mark.parametrize("stream", [True, False])
def test_extra_fields_stand_at_each_level_and_the_sent_bytes_are_kept(provider: Simulated, stream: bool) -> None:
    answered = provider.chat("sim-extra-fields", stream=stream, usage=True)
    kept = provider.request("GET", f"/__requests/{provider.last()['n']}/response")
    assert kept.body == answered.body
    for mark in (
        b'"x_root" :{"deep": [1, 2.50, 1e3',
        b'"x_choice" : [ null,true ]',
        b'"x_delta":{"a":-0.0 ,',
        b'"x_usage" :',
    ):
        assert mark in answered.body


def test_a_close_delimited_body_has_no_length(provider: Simulated) -> None:
    for stream in (True, False):
        answered = provider.chat("sim-close-delimited", stream=stream)
        assert not {"content-length", "transfer-encoding"} & set(answered.headers)
        assert provider.last()["completed"]


def test_slow_drip_writes_byte_by_byte(provider: Simulated) -> None:
    with provider.connect(chat_body("sim-slow-drip:ms=2,tokens=1")) as raw:
        sizes = [len(raw.recv(65536)) for _ in range(50)]
    assert sum(sizes) < 150
