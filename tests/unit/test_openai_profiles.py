"""What differs between providers with OpenAI's wire: their streams, their usage, and what they are sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from providers.codec import ChatCall, Upstream
from providers.events import Channel, Completed, UsageSeen
from providers.openai import OpenAICodec
from providers.openai_request import without
from providers.openai_wire import usage_of
from tests.support.codecs import fed, payloads, texts, transcripts

WIRES = transcripts("openai")
STREAMS = {
    # kind -> (text, reasoning, prompt, output, cached, reasoning tokens)
    "azure_filters": ("ab", "", 9, 2, 0, 0),
    "groq": ("a", "", 9, 2, 3, 1),
    "mistral": ("a", "", 9, 2, 0, 0),
    "ollama": ("a", "Hm", 9, 2, 0, 0),
    "transformers": ("ab", "", 9, 2, 0, 0),
    "vllm": ("a", "Hm", 9, 2, 0, 0),
    "xai": ("a", "Hm", 32, 103, 6, 94),
}


def read(name: str, **call: Any) -> list[Any]:
    codec = OpenAICodec(Upstream("p", name, b"/v1"), ChatCall(body=b"", model="m", stream=True, **call))
    return fed(codec, [WIRES[name]])


@pytest.mark.parametrize("name", STREAMS)
def test_a_providers_stream_is_read_with_its_usage(name: str) -> None:
    text, reasoning, *counts = STREAMS[name]
    events = read(name)
    content = texts(events, Channel.CONTENT)
    assert content.removeprefix("Hm") == text  # Mistral's thinking is part of its content
    assert texts(events, Channel.REASONING) == reasoning
    usage = [event.usage for event in events if isinstance(event, UsageSeen)][-1]
    assert [usage.prompt, usage.output, usage.cached, usage.reasoning] == counts
    assert isinstance(events[-1], Completed)
    assert events[-1].missing_finish == ()


def test_azures_filter_results_pass_but_its_first_chunk_only_to_who_asked_for_usage() -> None:
    assert all(payload["choices"] for payload in payloads(read("azure_filters")))
    wanted = payloads(read("azure_filters", usage_wanted=True))
    assert "prompt_filter_results" in wanted[0]
    assert sum("content_filter_offsets" in str(payload) for payload in wanted) == 2


def test_reasoning_beside_the_completion_is_told_by_the_total() -> None:
    def usage(**more: Any) -> Any:
        details = {"completion_tokens_details": {"reasoning_tokens": 5}}
        return usage_of(json.dumps({"prompt_tokens": 10, "completion_tokens": 7, **details, **more}).encode())

    assert (usage(total_tokens=17).output, usage().output, usage(total_tokens=99).output) == (7, 7, 7)
    beside = usage(total_tokens=22)
    assert (beside.output, beside.reasoning) == (12, 5)
    assert json.loads(beside.raw)["completion_tokens"] == 12
    assert usage(total_tokens=22, other=1).output == 12


AZURE = {
    # (path of the base, api version) -> target
    ("/openai/v1", None): b"/openai/v1/chat/completions",
    ("/openai/v1", "preview"): b"/openai/v1/chat/completions?api-version=preview",
    ("/openai", "2024-10-21"): b"/openai/deployments/my%20model/chat/completions?api-version=2024-10-21",
    ("/openai/deployments/d", "2024-10-21"): b"/openai/deployments/d/chat/completions?api-version=2024-10-21",
}


@pytest.mark.parametrize(("path", "version"), AZURE)
def test_azure_has_two_forms_of_addresses(path: str, version: str | None) -> None:
    options = {} if version is None else {"api_version": version}
    upstream = Upstream("p", "azure", path.encode(), key="k", options=options, key_style="api-key")
    call = ChatCall(b"{}", "my model", stream=True)
    request = OpenAICodec(upstream, call).request(call, "r")
    assert request.target == AZURE[path, version]
    assert dict(request.headers)[b"api-key"] == b"k"
    assert b"authorization" not in dict(request.headers)


def test_a_key_goes_as_a_bearer_unless_the_kind_says_otherwise() -> None:
    call = ChatCall(b"{}", "m", stream=False)
    request = OpenAICodec(Upstream("p", "azure", b"/openai/v1", key="k"), call).request(call, "r")
    assert dict(request.headers)[b"authorization"] == b"Bearer k"


def test_dropped_members_are_left_out_and_the_others_keep_their_bytes() -> None:
    body = b'{"model": "m", "store":false, "x": {"a" :1.0}, "stream_options":{"include_usage":true}}'
    assert without(body, frozenset(("store", "stream_options"))) == b'{"model":"m","x":{"a" :1.0}}'
    assert without(body, frozenset(("user", "*"))) is body
    call = ChatCall(body, "m", stream=True)
    request = OpenAICodec(Upstream("p", "mistral", b"/v1", drop=frozenset(("store",))), call).request(call, "r")
    assert b"store" not in request.body
