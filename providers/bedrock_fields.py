"""Whose a model of Bedrock is, and which of that maker's own fields pass through `additionalModelRequestFields`.

Must not: pass a field that is not listed here: it may be another output limit, more answers than were asked for, a beta
with prices of its own, or a prompt that no hold has seen.
Sources: Amazon Bedrock user guide, "Inference request parameters and response fields for foundation models", a page for
each maker; Amazon Nova user guides, "Core inference" and "Extended thinking"; Anthropic's documentation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from providers.chat_request import BadRequest, refuse

REQUEST_FIELDS = "additionalModelRequestFields"
_THINKING = frozenset(("type", "budget_tokens", "display"))

FIELDS: Mapping[str, Mapping[str, frozenset[str] | None]] = {
    "anthropic": {
        "top_k": None,
        "thinking": _THINKING,
        "reasoning_config": _THINKING,
        "output_config": frozenset(("effort", "format")),
    },
    "openai": {"reasoning_effort": None, "reasoning": frozenset(("effort",))},
    "amazon": {"inferenceConfig": frozenset(("topK",)), "reasoningConfig": frozenset(("type", "maxReasoningEffort"))},
    "meta": {},
    "mistral": {"top_k": None},
    "cohere": {"k": None, "seed": None, "frequency_penalty": None, "presence_penalty": None},
    "ai21": {"frequency_penalty": None, "presence_penalty": None},
    "deepseek": {"reasoning_effort": None},
    "qwen": {},
}
"""Fields of each maker's models beside those that Converse has names for. With names: an object with these members."""
_MAKER = re.compile(rf"(?:^|[./])({'|'.join(FIELDS)})\.")


def family_of(model: str) -> str:
    """Whose model it is by its id: `us.anthropic.claude-...`, `openai.gpt-oss-...`, an ARN with one of those; or ""."""
    found = _MAKER.search(model)
    return found[1] if found else ""


def checked_fields(given: Any, place: str, family: str, drop: frozenset[str]) -> dict[str, Any]:
    """The client's own fields that pass. `place` is where they stand in the request ("" for its root). Raises
    BadRequest; Unsupported for any other, unless `drop` has it by its place."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise BadRequest(place, f"'{place}' must be an object.")
    known = FIELDS.get(family, {})
    passed: dict[str, Any] = {}
    for name, value in given.items():
        path = f"{place}.{name}" if place else name
        if name not in known:
            refuse(path, drop)
        elif value is not None:
            passed[name] = _checked(value, path, known[name], drop)
    return passed


def _checked(value: Any, path: str, members: frozenset[str] | None, drop: frozenset[str]) -> Any:
    """`members` None: a plain value."""
    if members is None:
        if isinstance(value, dict | list):
            raise BadRequest(path, f"'{path}' must be a string or a number.")
        return value
    if not isinstance(value, dict):
        raise BadRequest(path, f"'{path}' must be an object.")
    for name in value.keys() - members:
        refuse(f"{path}.{name}", drop)
    return {name: inner for name, inner in value.items() if name in members}
