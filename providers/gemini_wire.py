"""Partial shapes of Google's `GenerateContentResponse`: what is translated, counted or decided on.

Must not: make OpenAI payloads, do I/O or hold money. Source: ai.google.dev/api/generate-content (v1beta) and the
Vertex reference, whose answers are the same but for members that are not read here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import msgspec

from providers.chat_chunks import count, reported, total
from providers.events import ReportedUsage
from providers.sse import FrameTooLarge, SseSplitter

_BARE = re.compile(rb"^[ \t]*[{\[]", re.MULTILINE)
_BROKEN_FINISHES = ("MALFORMED_", "UNEXPECTED_", "TOO_MANY_", "MISSING_")
_FINISHES = {"STOP": "stop", "MAX_TOKENS": "length"}
_NOTHING = {"thought", "thoughtSignature", "partMetadata"}
NO_REASON = (None, "", "FINISH_REASON_UNSPECIFIED", "BLOCK_REASON_UNSPECIFIED", "BLOCKED_REASON_UNSPECIFIED")
"""Protobuf's default values: nothing is said."""


class FunctionCall(msgspec.Struct, gc=False):
    name: str = ""
    id: str | None = None
    args: msgspec.Raw = msgspec.Raw()  # as sent: it becomes text, digit for digit

    def arguments(self) -> str:
        """The arguments as OpenAI has them, a JSON text."""
        text = bytes(self.args).decode()
        return "{}" if text in ("", "null") else text


class InlineData(msgspec.Struct, rename="camel", gc=False):
    mime_type: str = "application/octet-stream"
    data: str = ""


class Part(msgspec.Struct, rename="camel", gc=False):
    text: str | None = None
    thought: bool | None = None
    thought_signature: str | None = None
    function_call: FunctionCall | None = None
    inline_data: InlineData | None = None


class Content(msgspec.Struct, gc=False):
    parts: list[Part] | None = None


class Candidate(msgspec.Struct, rename="camel"):
    index: int = 0
    content: Content | None = None
    finish_reason: str | None = None
    grounding_metadata: dict[str, Any] | None = None
    citation_metadata: dict[str, Any] | None = None


class PromptFeedback(msgspec.Struct, rename="camel", gc=False):
    block_reason: str | None = None
    block_reason_message: str | None = None


class Frame(msgspec.Struct, rename="camel"):
    candidates: list[Candidate] | None = None
    prompt_feedback: PromptFeedback | None = None
    usage_metadata: dict[str, Any] | None = None
    model_version: str | None = None
    response_id: str | None = None
    error: Any = None


_decode_frame = msgspec.json.Decoder(Frame).decode
_decode_any = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class GeminiSplitter(SseSplitter):
    """SSE as Google sends it: an error in the middle of a stream may come as bare JSON without `data:`, over several
    lines, right behind a frame or at the body's end."""

    __slots__ = ()

    def _parse(self, block: bytes) -> tuple[bytes, bytes] | None:
        found = _BARE.search(block)
        if found is None:
            return super()._parse(block)
        if len(block) - found.start() > self._frame_bytes_max:
            raise FrameTooLarge
        return b"", block[found.start() :]


class Piece(msgspec.Struct, gc=False):
    """What one part gives: a text or a thought; a function call with its signature; the signature of anything else;
    an image as a data URL; or a part of another kind, whole (a JSON object) and the code in it."""

    kind: Literal["text", "thought", "call", "signature", "image", "part"]
    text: str = ""
    call: FunctionCall | None = None
    arguments: str = ""
    part: msgspec.Raw = msgspec.Raw()


def read_frame(payload: bytes) -> tuple[Frame, list[tuple[Candidate, list[Piece]]]]:
    """A payload and what each candidate's parts give, in order. Raises one of UNREADABLE."""
    frame = _decode_frame(payload)
    whole: list[Any] = []  # the payload as plain values, read at most once and only for parts of another kind

    def other(position: int, at: int) -> dict[str, Any]:
        if not whole:
            whole.append(_decode_any(payload))
        part: dict[str, Any] = whole[0]["candidates"][position]["content"]["parts"][at]
        return part

    candidates = frame.candidates or []
    return frame, [(each, _pieces(each, partial(other, at))) for at, each in enumerate(candidates)]


def _pieces(candidate: Candidate, other: Callable[[int], dict[str, Any]]) -> list[Piece]:
    content = candidate.content
    found: list[Piece] = []
    for at, part in enumerate((content.parts or ()) if content is not None else ()):
        signature = part.thought_signature or ""
        if part.function_call is not None:
            found.append(Piece("call", signature, part.function_call, part.function_call.arguments()))
            continue
        if part.text:
            found.append(Piece("thought" if part.thought else "text", part.text))
        elif part.text is None and not _image(found, part):
            whole = other(at)
            if not whole.keys() <= _NOTHING:
                # Written here, where what cannot be written (too deep a nesting) is still damage and no accident.
                found.append(Piece("part", _code_in(whole), part=msgspec.Raw(_encode(whole))))
                continue
        if signature:
            found.append(Piece("signature", signature))
    return found


def _image(found: list[Piece], part: Part) -> bool:
    data = part.inline_data
    if data is None or not data.mime_type.startswith("image/"):
        return False
    found.append(Piece("image", f"data:{data.mime_type};base64,{data.data}"))
    return True


def _code_in(part: dict[str, Any]) -> str:
    """The text that the model wrote in a part of another kind: code for Google to run. What running it printed is
    input to the model, not output."""
    code = part.get("executableCode")
    text = code.get("code") if isinstance(code, dict) else None
    return text if isinstance(text, str) else ""


def finish_reason(native: str, *, called: bool) -> str | None:
    """OpenAI's word for a native finish reason, None where the answer cannot be used.

    Wire.md 5: STOP with a function call is `tool_calls`. Everything that is neither a natural end nor the token limit
    (SAFETY, RECITATION, BLOCKLIST, PROHIBITED_CONTENT, SPII, LANGUAGE, IMAGE_*, MODEL_ARMOR, OTHER and whatever comes
    next) is `content_filter`: the only one of OpenAI's words that does not claim that the answer is whole.
    """
    if native.startswith(_BROKEN_FINISHES):
        return None
    if native == "STOP" and called:
        return "tool_calls"
    return _FINISHES.get(native, "content_filter")


class UsageSoFar:
    """`usageMetadata` over a stream: of each field the last value seen, because the last chunk may drop some.

    Where Google runs tools, output counts begin again with each step and only the last chunk has their sums: until then
    the most that was seen is the better bound of what an aborted stream costs.
    """

    __slots__ = ("_fields", "_most")

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}
        self._most: dict[str, int] = {}

    def update(self, usage: dict[str, Any]) -> None:
        """Note what one chunk says."""
        for name in _COUNTS + _DETAILS:
            if usage.get(name) is not None:
                self._fields[name] = usage[name]
        for name in _OUTPUT:
            if usage.get(name) is not None:
                self._most[name] = max(self._most.get(name, -1), count(usage[name]))

    def reported(self, *, spoke: bool, thought: bool, final: bool) -> ReportedUsage | None:
        """OpenAI's counts (wire.md 5). `spoke` and `thought`: whether answer text, or thoughts, were given out;
        `final`: every candidate has ended.

        prompt = promptTokenCount + toolUsePromptTokenCount, output = candidatesTokenCount + thoughtsTokenCount. Google
        leaves zeros out, and early chunks leave out counts that are not zero: a missing one is zero only as long as
        nothing was given out that it would have to count; else the report is partial. Counts that are no integers
        come back as -1, so that whoever prices them refuses the report.
        """
        prompt = self._count("promptTokenCount")
        made, thoughts = [self._count(name) if final else self._most.get(name) for name in _OUTPUT]
        if prompt is None:
            return None
        given = total(prompt, self._count("toolUsePromptTokenCount") or 0)
        cached = self._count("cachedContentTokenCount") or 0
        heard = self._of("AUDIO", "promptTokensDetails") + self._of("AUDIO", "toolUsePromptTokensDetails")
        heard -= self._of("AUDIO", "cacheTokensDetails")  # a token is charged once: as cached
        said = min(self._of("AUDIO", "candidatesTokensDetails"), made or 0)
        drawn = max(0, min(self._of("IMAGE", "candidatesTokensDetails"), (made or 0) - said))
        report = ReportedUsage(
            prompt=given,
            output=total(made or 0, thoughts or 0),
            cached=cached,
            reasoning=thoughts or 0,
            audio_input=max(0, min(heard, given - cached)),
            audio_output=said,
            image_output=drawn,
            partial=(made is None and spoke) or (thoughts is None and thought),
        )
        return reported(report, {"completion_tokens_details": {"image_tokens": drawn}} if drawn else None)

    def _count(self, name: str) -> int | None:
        value = self._fields.get(name)
        return None if value is None else count(value)

    def _of(self, modality: str, name: str) -> int:
        """Tokens of a modality in one of the `...Details` lists."""
        of_it = [each.get("tokenCount") for each in _dicts(self._fields.get(name)) if each.get("modality") == modality]
        return sum(max(0, count(tokens)) for tokens in of_it)


_OUTPUT = ("candidatesTokenCount", "thoughtsTokenCount")
_COUNTS = (*_OUTPUT, "promptTokenCount", "toolUsePromptTokenCount", "cachedContentTokenCount")
_DETAILS = ("promptTokensDetails", "toolUsePromptTokensDetails", "cacheTokensDetails", "candidatesTokensDetails")


def citations(candidate: Candidate) -> list[dict[str, Any]]:
    """OpenAI's url_citation annotations from grounding and citations, one for each source.

    Without places in the text: Google's are bytes of one part, OpenAI's characters of the whole message.
    """
    found: dict[str, str] = {}
    for source in _dicts((candidate.grounding_metadata or {}).get("groundingChunks")):
        place = source.get("web") or source.get("retrievedContext") or source.get("maps")
        if isinstance(place, dict):
            _note(found, place)
    metadata = candidate.citation_metadata or {}
    for source in _dicts(metadata.get("citationSources") or metadata.get("citations")):
        _note(found, source)
    return [{"type": "url_citation", "url_citation": {"url": url, "title": title}} for url, title in found.items()]


def _note(found: dict[str, str], source: dict[str, Any]) -> None:
    url, title = source.get("uri"), source.get("title")
    if isinstance(url, str) and url:
        found.setdefault(url, title if isinstance(title, str) else "")


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
