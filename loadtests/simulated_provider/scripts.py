"""Scripted trouble by model name: `sim-<script>[+<script>...][:option=value[,option=value...]]`.

Must not: write to sockets or count tokens; a script only turns knobs, and the plan follows them.
An option may also be written `option.value`, for places where `=` is not allowed in a model's name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from loadtests.simulated_provider import steps, wire
from loadtests.simulated_provider.chat import TOKENS_MAX, BadRequest, Shape
from loadtests.simulated_provider.steps import Step

MS_MAX: Final = 3_600_000
SIZE_MAX: Final = 64 * 1024 * 1024
PLAIN_MODELS: Final = ("gpt-4o-mini", "gpt-4o")
_OPTION = re.compile(r"([a-z_]+)[=.]([A-Za-z0-9_-]{1,64})")
_BOUNDS: Final = {"tokens": TOKENS_MAX, "think": TOKENS_MAX, "size": SIZE_MAX, "count": 128}
Options = dict[str, Any]


@dataclass(slots=True)
class Reply:
    """A reply that is no chat answer. `raw` replaces everything, status line included."""

    status: int = 200
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    content_type: str = "application/json"
    raw: bytes | None = None


@dataclass(slots=True)
class Knobs:
    """What scripts may turn. Times in milliseconds."""

    tally: Counter[str]
    stream: bool
    interval_ms: float = 0.0
    ttft_ms: float = 0.0
    head_ms: float = 0.0
    first_ms: float = 0.0
    drip_ms: float | None = None
    shape: Shape = field(default_factory=Shape)
    chars: int = 0  # 0: a token per chunk
    extra: bool = False
    record: bool = False
    tool_index: bool = True
    reasoning_field: str = "reasoning_content"
    role: bool = True
    finish: bool = True
    usage: str = "asked"  # asked, never, finish, everywhere
    usages: Callable[[dict[str, Any]], list[dict[str, Any]]] = lambda usage: [usage]
    cached: int = 0
    chunked: bool = True
    transforms: list[Callable[[wire.Frames], steps.Transform]] = field(default_factory=list)
    reply: Reply | None = None
    broken_whole: str = ""  # what becomes of a call that does not stream: stall, reset, close


@dataclass(slots=True, frozen=True)
class Script:
    """One script: a line for people, its options with their defaults, and what it does."""

    about: str
    apply: Callable[[Knobs, Options], None]
    options: Options = field(default_factory=dict)


ERRORS: Final[dict[int, tuple[str, str | None, str]]] = {
    400: ("invalid_request_error", None, "Invalid request."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided: sk-sim*****."),
    402: ("insufficient_quota", "insufficient_quota", "Insufficient credits."),
    403: ("request_forbidden", "unsupported_country_region_territory", "Country, region, or territory not supported"),
    404: ("invalid_request_error", "model_not_found", "The model does not exist or you do not have access to it."),
    408: ("server_error", None, "Request timed out."),
    409: ("invalid_request_error", None, "Conflict."),
    413: ("invalid_request_error", None, "Request too large."),
    422: ("invalid_request_error", None, "Unprocessable entity."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for requests. Please try again in 7s."),
    500: ("server_error", None, "The server had an error while processing your request. Sorry about that!"),
    502: ("server_error", None, "Bad gateway."),
    503: ("server_error", None, "The engine is currently overloaded, please try again later"),
    504: ("server_error", None, "Gateway timeout."),
    529: ("server_error", "overloaded", "Overloaded."),
}


def error_reply(status: int, retry_after: str = "none", code: str = "") -> Reply:
    kind, usual, message = ERRORS[status]
    headers = [("retry-after", retry_after)] if retry_after != "none" else []
    if status == 429:
        headers += [("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "7s")]
    if code == "insufficient_quota":
        kind, message = code, "You exceeded your current quota, please check your plan and billing details."
    return Reply(status, headers, wire.error_body(message, kind, None, code or usual))


def _status(status: int) -> Script:
    def apply(knobs: Knobs, options: Options) -> None:
        knobs.reply = error_reply(status, options["retry_after"], options["code"])

    retry_after = "7" if status == 429 else "none"
    return Script(f"HTTP {status} with OpenAI's error body", apply, {"retry_after": retry_after, "code": ""})


def _turn(**values: Any) -> Callable[[Knobs, Options], None]:
    """A script that sets knobs to fixed values."""

    def apply(knobs: Knobs, options: Options) -> None:
        for name, value in values.items():
            setattr(knobs, name, value)

    return apply


def _shape(**values: Any) -> Callable[[Knobs, Options], None]:
    def apply(knobs: Knobs, options: Options) -> None:
        for name, value in values.items():
            setattr(knobs.shape, name, options[value] if isinstance(value, str) else value)

    return apply


def _over(transform: steps.Transform) -> Callable[[Knobs, Options], None]:
    return lambda knobs, options: knobs.transforms.append(lambda frames: transform)


def _ms(knob: str) -> Callable[[Knobs, Options], None]:
    return lambda knobs, options: setattr(knobs, knob, options["ms"])


def _stop(knobs: Knobs, after: int, last: list[Step]) -> None:
    knobs.transforms.append(lambda frames: steps.insert(after, lambda: last, resume=False))


def _stall(knobs: Knobs, options: Options) -> None:
    knobs.broken_whole = "stall"
    _stop(knobs, options["after"], [Step(kind="stall")])


def _cut(knobs: Knobs, options: Options) -> None:
    knobs.broken_whole = "reset" if options["how"] == "rst" else "close"
    half = [Step(b'data: {"id":"chatcmpl-half","object":"chat.comp')] if options["mid"] else []
    _stop(knobs, options["after"], [*half, Step(kind=knobs.broken_whole)])


def _truncate(knobs: Knobs, options: Options) -> None:
    knobs.broken_whole = "close"
    _stop(knobs, options["after"], [Step(kind="broken")])


_GARBAGE: Final = {
    "text": b"data: this is not JSON\n\n",
    "half": b'data: {"id":"chatcmpl-1","choices":[{"ind\n\n',
    "array": b"data: [1, 2]\n\n",
    "null": b"data: null\n\n",
    "empty": b"data:\n\n",
    "binary": b"data: \xff\xfe\x00\x80\n\n",
    "html": b"<html><body>502 Bad Gateway</body></html>\n\n",
}


def _one_of(options: Options, name: str, allowed: Any) -> Any:
    if options[name] not in allowed:
        choices = ", ".join(sorted(allowed))
        raise BadRequest(f"Option '{name}' of the model is one of {choices}.", "model", "invalid_value")
    return options[name]


def _garbage(knobs: Knobs, options: Options) -> None:
    data = _GARBAGE[_one_of(options, "kind", _GARBAGE)]
    if not knobs.stream:
        knobs.reply = Reply(body=b'{"id": "chatcmpl-1", "choices": [{"ind')
    knobs.transforms.append(lambda frames: steps.insert(options["after"], lambda: [Step(data)], resume=True))


def _in_band(knobs: Knobs, after: int, frame: Callable[[wire.Frames], bytes], done: bool, error: bytes) -> None:
    """An error inside a 200: as a frame of a stream, as the body of a call that does not stream."""
    if not knobs.stream:
        knobs.reply = Reply(body=error)

    def transform(frames: wire.Frames) -> steps.Transform:
        last = [Step(frame(frames)), *([Step(wire.DONE)] if done else []), Step(kind="broken")]
        return steps.insert(after, lambda: last, resume=False)

    knobs.transforms.append(transform)


_BROKE: Final = "The server had an error while processing your request. Sorry about that!"


def _error_frame(knobs: Knobs, options: Options) -> None:
    error = wire.error_body(_BROKE, "server_error", None, options["code"] or None)
    _in_band(knobs, options["after"], lambda frames: b"data: %b\n\n" % error, bool(options["done"]), error)


def _event_error(knobs: Knobs, options: Options) -> None:
    error = wire.encode({"type": "error", "code": "server_error", "message": _BROKE, "param": None})
    _in_band(knobs, options["after"], lambda frames: b"event: error\ndata: %b\n\n" % error, False, error)


def _finish_error(knobs: Knobs, options: Options) -> None:
    error = wire.encode({"error": {"code": 502, "message": _BROKE}})
    _in_band(knobs, options["after"], lambda frames: frames.error_chunk(_BROKE), True, error)


def _huge_frame(knobs: Knobs, options: Options) -> None:
    def transform(frames: wire.Frames) -> steps.Transform:
        padding = b'"content":"","x_padding":"%b"' % (b"x" * options["size"])
        return steps.insert(options["after"], lambda: [Step(frames.delta(0, padding))], resume=True)

    knobs.transforms.append(transform)


def _azure(knobs: Knobs, options: Options) -> None:
    knobs.transforms.append(lambda frames: steps.insert(0, lambda: [Step(frames.azure_preamble())], resume=True))


def _wrong(**changes: Any) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    return lambda usage: [usage | changes]


_WRONG_USAGE: Final[dict[str, Callable[[dict[str, Any]], list[dict[str, Any]]]]] = {
    "big": lambda u: [u | {"completion_tokens": u["completion_tokens"] * 10 + 1000}],
    "small": lambda u: [u | {"completion_tokens": u["completion_tokens"] // 2}],
    "negative": _wrong(prompt_tokens=-5, completion_tokens=-7, total_tokens=-12),
    "huge": _wrong(prompt_tokens=10**18, completion_tokens=10**18, total_tokens=2 * 10**18),
    "two": lambda u: [u | {"completion_tokens": u["completion_tokens"] + 50}, u],
    "string": _wrong(completion_tokens="84"),
    "float": _wrong(completion_tokens=84.5),
    "boolean": _wrong(completion_tokens=True),
    "null": _wrong(prompt_tokens=None, completion_tokens=None),
    "cached": lambda u: [u | {"prompt_tokens_details": {"cached_tokens": u["prompt_tokens"] + 1000}}],
    "reasoning": lambda u: [u | {"completion_tokens_details": {"reasoning_tokens": u["completion_tokens"] + 1000}}],
    "empty": lambda u: [{}],
}


def _wrong_usage(knobs: Knobs, options: Options) -> None:
    knobs.usages = _WRONG_USAGE[_one_of(options, "kind", _WRONG_USAGE)]


def _reasoning(knobs: Knobs, options: Options) -> None:
    knobs.shape.think_tokens, knobs.shape.think_hidden = options["think"], bool(options["hidden"])
    knobs.reasoning_field = _one_of(options, "field", ("reasoning_content", "reasoning"))


def _no_tool_index(knobs: Knobs, options: Options) -> None:
    knobs.tool_index = False
    knobs.shape.tool_calls = knobs.shape.tool_calls or 1


def _empty(knobs: Knobs, options: Options) -> None:
    _stop(knobs, 0, [Step(kind="broken")])
    if not knobs.stream:
        knobs.reply = Reply()


def _json_for_stream(knobs: Knobs, options: Options) -> None:
    if options["body"] == "completion":
        knobs.stream = False
    else:
        knobs.reply = Reply(body=error_reply(500).body)


def _fail_times(knobs: Knobs, options: Options) -> None:
    status = options["status"]
    if status not in ERRORS:
        raise BadRequest("Option 'status' of the model is not a status that fails.", "model", "invalid_value")
    knobs.tally[options["tag"]] += 1
    if knobs.tally[options["tag"]] <= options["times"]:
        knobs.reply = error_reply(status)


def _crowded(knobs: Knobs, options: Options) -> None:
    knobs.reply = Reply(400, [], wire.error_body(_TOO_LONG, ERRORS[400][0], "messages", "context_length_exceeded"))


_TOO_LONG: Final = (
    "This model's maximum context length is 128000 tokens. However, your messages resulted in 130001 tokens. "
    "Please reduce the length of the messages."
)
_HTML: Final = b"<!DOCTYPE html>\n<html><body><h1>Welcome to nginx!</h1></body></html>\n"
_NOT_HTTP: Final = b"\x15\x03\x01\x00\x02\x02\x28 this is not HTTP\r\n"
_FINISHES: Final = frozenset({"finish"})
_DONES: Final = frozenset({"done"})

SCRIPTS: Final[dict[str, Script]] = {
    "slow-headers": Script("the status line comes late", _ms("head_ms"), {"ms": 2000}),
    "slow-first": Script("headers and role at once, the first content late", _ms("first_ms"), {"ms": 2000}),
    "slow-drip": Script("one byte a write", _ms("drip_ms"), {"ms": 0}),
    "stall": Script("stalls for ever after some chunks", _stall, {"after": 3}),
    "cut": Script("closes the connection mid-stream (how=fin or rst)", _cut, {"after": 3, "how": "fin", "mid": 0}),
    "truncate": Script("ends the body cleanly, but without finish_reason and [DONE]", _truncate, {"after": 3}),
    "empty": Script("200 with an empty body", _empty),
    "close-delimited": Script("no length and no chunks: the close ends the body", _turn(chunked=False)),
    "garbage": Script("a frame that is not a JSON object", _garbage, {"after": 3, "kind": "text"}),
    "not-http": Script("bytes that are not HTTP", _turn(reply=Reply(raw=_NOT_HTTP))),
    "html": Script("200 with an HTML page", _turn(reply=Reply(body=_HTML, content_type="text/html"))),
    "json-for-stream": Script("200 with a JSON body for a stream", _json_for_stream, {"body": "error"}),
    "context-length": Script("HTTP 400 context_length_exceeded", _crowded),
    "fail-times": Script("fails the first calls of a tag", _fail_times, {"times": 1, "tag": "default", "status": 500}),
    "error-frame": Script("an in-band error frame", _error_frame, {"after": 3, "done": 1, "code": ""}),
    "event-error": Script("`event: error` with a bare error object", _event_error, {"after": 3}),
    "finish-error": Script('OpenRouter\'s error chunk: finish_reason "error"', _finish_error, {"after": 3}),
    "no-usage": Script("never sends usage", _turn(usage="never")),
    "zero-usage": Script("usage of explicit zeros", _turn(usages=lambda u: [wire.usage_object(0, 0, 0, 0)])),
    "wrong-usage": Script("usage that is not true", _wrong_usage, {"kind": "big"}),
    "usage-everywhere": Script("cumulative usage in every chunk", _turn(usage="everywhere")),
    "usage-on-finish": Script("usage on the finish chunk", _turn(usage="finish")),
    "cached": Script(
        "part of the prompt reported as cached", lambda k, o: setattr(k, "cached", o["count"]), {"count": 4}
    ),
    "huge-frame": Script("one frame of this many bytes more", _huge_frame, {"after": 3, "size": 2 * 1024 * 1024}),
    "comments": Script("comment lines before and between frames", _over(steps.comments)),
    "crlf": Script("lines end in CR LF", _over(steps.rewrite(lambda data: data.replace(b"\n", b"\r\n")))),
    "cr": Script("lines end in CR", _over(steps.rewrite(lambda data: data.replace(b"\n", b"\r")))),
    "no-space": Script("`data:` without a space", _over(steps.rewrite(lambda d: re.sub(rb"(?m)^data: ", b"data:", d)))),
    "id-lines": Script("id:, retry: and event: ping lines", _over(steps.id_lines)),
    "no-done": Script("no [DONE]", _over(steps.without(_DONES))),
    "no-finish": Script("no finish_reason", _turn(finish=False)),
    "no-role": Script("no role anywhere", _turn(role=False)),
    "azure": Script("Azure's first chunk: no choices", _azure),
    "chars": Script("deltas of some characters, not tokens", lambda k, o: setattr(k, "chars", o["size"]), {"size": 4}),
    "tools": Script("calls a tool even when none is offered", _shape(tool_calls=1)),
    "parallel-tools": Script("several tool calls", _shape(tool_calls="count"), {"count": 2}),
    "no-tool-index": Script("tool deltas without index", _no_tool_index),
    "reasoning": Script("thinks first", _reasoning, {"think": 40, "hidden": 0, "field": "reasoning_content"}),
    "refusal": Script("refuses", _shape(refuse=True)),
    "extra-fields": Script("unknown fields at each level, oddly written", _turn(extra=True, record=True)),
    **{str(status): _status(status) for status in ERRORS},
}
_ANYWHERE: Final[Options] = {"tokens": 0, "interval_ms": 0, "ttft_ms": 0, "record": 0}


def _value(name: str, written: str, default: Any) -> Any:
    if isinstance(default, str):
        return written
    most = _BOUNDS.get(name, MS_MAX)
    if not written.isdecimal() or int(written) > most:
        raise BadRequest(f"Option '{name}' of the model is a whole number up to {most}.", "model", "invalid_value")
    return int(written)


def _names(model: str) -> tuple[list[str], str]:
    names, _, written = model.removeprefix("sim-").partition(":")
    unknown = [name for name in names.split("+") if name not in SCRIPTS]
    if unknown:
        message = f"The model `{model}` does not exist or you do not have access to it."
        raise BadRequest(message, None, "model_not_found", 404)
    return names.split("+"), written


def turn(knobs: Knobs, model: str) -> None:
    """Turn the knobs as the model's name says. Raises BadRequest for scripts and options that do not exist."""
    if not model.startswith("sim-"):
        return
    names, written = _names(model)
    options = dict(_ANYWHERE)
    for name in names:
        options |= SCRIPTS[name].options
    given: Options = {}
    for part in filter(None, re.split("[,:]", written)):
        match = _OPTION.fullmatch(part)
        if match is None or match[1] not in options:
            known = ", ".join(options)
            raise BadRequest(
                f"Option '{part}' of the model is not known; these are: {known}.", "model", "invalid_value"
            )
        given[match[1]] = _value(match[1], match[2], options[match[1]])
    knobs.shape.tools_by_request = False  # offered tools alone do not turn a script's text into a tool call
    for name in names:
        SCRIPTS[name].apply(knobs, options | given)
    knobs.shape.tokens = given.get("tokens")
    knobs.interval_ms = given.get("interval_ms", knobs.interval_ms)
    knobs.ttft_ms = given.get("ttft_ms", knobs.ttft_ms)
    knobs.record = bool(given.get("record", knobs.record))


def models() -> list[str]:
    return [*PLAIN_MODELS, *(f"sim-{name}" for name in SCRIPTS)]
