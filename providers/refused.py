"""Members of a request that buy more than a candidate's price covers, or that set again what the gateway has set.

Which names a provider refuses says its configuration (`config.kinds`, `refused`); here is which of their values buy
nothing, and which names another server may read as one of the gateway's own.
Must not: know a provider, or look into a body that has none of the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

READ = frozenset(
    (
        *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n"),
        *("tools", "functions", "response_format", "modalities", "audio"),
    )
)
"""Members that the gateway reads or writes: what it held credit for, and how the answer is measured."""

_BUYS_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default", "flex", "on_demand"),
    "route": ("fallback",),
    "models": ([],),
    "plugins": ([],),
    "data_sources": ([],),
    "search_parameters": ({"mode": "off"},),
    "deferred": (False,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "n_cmpl": (1,),
    "n_probs": (0,),
}
"""Values of such members that cost what the call costs without them. `auto` is what OpenAI takes where no tier is
named, so refusing it would change nothing: a project whose own default is dearer needs a price that says so."""
_CLIENTS = (None, "function", "custom")


def buys(name: str, value: Any) -> bool:
    """Whether a refused member's decoded value asks for something. Of tools do those that the provider runs itself."""
    if name == "tools":
        return isinstance(value, list) and any(map(is_servers, value))
    return value is not None and value not in _BUYS_NOTHING.get(name, ())


def is_servers(tool: Any) -> bool:
    """Whether the provider would run this tool (and bill it), not the client."""
    if not isinstance(tool, dict):
        return False
    kind = tool.get("type")
    return kind not in _CLIENTS or (kind is None and "function" not in tool)


def reason(name: str) -> str:
    """What the client is told."""
    return f"'{name}' may cost more than the price of this model covers. Leave it out."


def other_spellings(names: Iterable[str], refused: frozenset[str]) -> list[str]:
    """Those of `names` that a server which reads names without their case (as Go's encoding/json does, with the long s
    and the Kelvin sign as s and k) takes for one of `READ` or `refused`."""
    joined = "".join(names)
    if joined.isascii() and joined.islower():
        return []
    known = READ | refused
    return [name for name in names if name not in known and name.casefold() in known]
