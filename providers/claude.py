"""What is known of Anthropic's Claude models, whoever serves them: versions, and what each version takes.

Must not: know a wire. Codecs ask here instead of each other.
Sources: platform.claude.com/docs/en/build-with-claude/effort, /adaptive-thinking, /extended-thinking; "What's new in
Claude 4.6" (prefill).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from providers.codec import BadRequest

OUTPUT_MAX = 32_000
"""Every model from 4.0 on writes at least so many tokens: the limit where a request has none and one is needed."""
BUDGET_MIN = 1_024
"""The least thinking budget, in tokens."""
THINKING_BLOCKS = "thinking_blocks"
"""The member of a message that carries signed and redacted thinking there and back."""
_NEWEST = (99, 0)
_ADAPTIVE_FROM = (4, 6)
_FIXED_SAMPLING_FROM = (4, 7)
_PREFILL_BELOW = (4, 6)
_VERSION = re.compile(r"claude-(?:[a-z]+-)*([0-9]{1,2})(?:[-.]([0-9]{1,2})(?![0-9]))?(?![0-9])")
_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "max"}
_BUDGETS = {"minimal": 10, "low": 20, "medium": 50, "high": 80, "xhigh": 95, "max": 95}
"""Percent of the output limit that may be thought with, where there is no effort (OpenRouter's rule)."""
_DETAILS = (None, "anthropic-claude-v1")
"""Formats of OpenRouter's `reasoning_details` that are these models' thinking."""


def claude_version(model: str) -> tuple[int, int]:
    """(4, 6) of `claude-sonnet-4-6` and `us.anthropic.claude-opus-4-6-v1`, (3, 5) of `claude-3-5-haiku-20241022`; a
    name of Claude's without a number is the newest, and any other model (0, 0)."""
    found = _VERSION.search(model)
    if found is not None:
        return int(found[1]), int(found[2] or 0)
    return _NEWEST if "claude" in model else (0, 0)


def adaptive(version: tuple[int, int], options: Mapping[str, str]) -> bool:
    """Whether the model decides itself how much to think, guided by an effort; before that, it has a budget. The option
    `thinking` ("adaptive" or "budget") says it for models whose name does not tell."""
    return options.get("thinking", "adaptive" if version >= _ADAPTIVE_FROM else "budget") == "adaptive"


def fixed_sampling(version: tuple[int, int]) -> bool:
    """Whether the model takes of `temperature` and `top_p` only the default, 1."""
    return version >= _FIXED_SAMPLING_FROM


def prefills(version: tuple[int, int]) -> bool:
    """Whether the model goes on from a last message of the assistant's. Newer ones refuse it with a 400."""
    return version < _PREFILL_BELOW


def effort_of(asked: str) -> str:
    """The native effort for a `reasoning_effort` other than none. Raises BadRequest."""
    if asked not in _EFFORTS:
        raise BadRequest("reasoning_effort", "'reasoning_effort' must be one of none, " + ", ".join(_EFFORTS) + ".")
    return _EFFORTS[asked]


def budget_of(asked: str, limit: int) -> int | None:
    """The thinking budget in tokens for a `reasoning_effort` that `effort_of` takes, within an output limit; None where
    there is no room for one."""
    budget = max(BUDGET_MIN, limit * _BUDGETS[asked] // 100)
    return budget if budget < limit else None


def thinking_pieces(extra: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An earlier answer's thinking among a message's further members, as blocks of Anthropic's: from `thinking_blocks`
    (as we, and LiteLLM, send it) or `reasoning_details` (as OpenRouter does), whole or in the pieces of a stream that
    nobody put together. Nothing in them is checked."""
    found = extra.get(THINKING_BLOCKS)
    if isinstance(found, list):
        return [piece for piece in found if isinstance(piece, dict)]
    details = extra.get("reasoning_details")
    pieces = []
    for detail in details if isinstance(details, list) else ():
        if not isinstance(detail, dict) or detail.get("format") not in _DETAILS:
            continue
        if detail.get("type") == "reasoning.encrypted":
            pieces.append({"type": "redacted_thinking", "data": detail.get("data")})
        elif detail.get("type") == "reasoning.text":
            pieces.append({"type": "thinking", "thinking": detail.get("text"), "signature": detail.get("signature")})
    return pieces
