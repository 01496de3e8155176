"""What differs between servers of OpenAI's wire on the way up: Azure's addresses, members that a server refuses, and
members that cost more than its price covers.

Must not: change a member that goes up (but for `tools`, which loses the provider's own where they are left out).
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import msgspec

from providers.codec import ChatCall, Unsupported, Upstream
from providers.json_root import RootObject
from providers.refused import buys, is_servers, other_spellings, reason

_WITH_TOOLS = ("tool_choice", "parallel_tool_calls")
"""What may not be said where there are no tools."""
_USAGE = frozenset(("include_usage",))


def azure_target(upstream: Upstream, call: ChatCall) -> bytes:
    """`/openai/v1/chat/completions`, or `/openai/deployments/<model>/chat/completions` where the base is no `/v1`, each
    with the `api-version` that is configured. A base that names a deployment itself is kept.
    Source: Azure OpenAI's REST reference and "API version lifecycle"."""
    base, version = upstream.target, upstream.options.get("api_version")
    if not base.endswith(b"/v1") and b"/deployments/" not in base:
        base = b"%b/deployments/%b" % (base, quote(call.model, safe="").encode())
    query = b"" if version is None else b"?api-version=" + quote(version, safe="").encode()
    return base + b"/chat/completions" + query


def affordable(body: bytes, root: RootObject | None, upstream: Upstream) -> bytes:
    """The body without what `upstream.refused` names, as far as it is left out by configuration. Raises Unsupported for
    anything else of it. `root` is the client's body: what the gateway put into `body` is none of this."""
    root = root or RootObject(body)
    found = [name for name in root.spans if name in upstream.refused and _buys(root, name)]
    others = _respelled(root, upstream.refused) if upstream.caseless else []
    left_out = frozenset(name for name in (*found, *others) if name not in upstream.drop)
    if not left_out:
        return body
    if "*" not in upstream.drop:
        name = next(each for each in root.spans if each in left_out)
        raise Unsupported(name, reason(name) if name in found else f"Write '{name.casefold()}' instead of '{name}'.")
    return _stripped(body, left_out)


def _respelled(root: RootObject, refused: frozenset[str]) -> list[str]:
    """Members under another spelling of a name that the gateway relies on. Raises Unsupported for the one that decides
    on usage, which can be left out as little as usage can."""
    if "stream_options" in root.spans:
        options = msgspec.json.decode(root.raw("stream_options") or b"null", type=dict[str, msgspec.Raw] | None)
        for name in other_spellings(options or (), _USAGE):
            raise Unsupported(f"stream_options.{name}", f"Write '{name.casefold()}' instead of '{name}'.")
    return other_spellings(root.spans, refused)


def _buys(root: RootObject, name: str) -> bool:
    """Of a doubled member nobody knows which one the server takes, and of one that cannot be read what it says."""
    try:
        return name in root.duplicates or buys(name, msgspec.json.decode(root.raw(name) or b"null"))
    except (msgspec.DecodeError, RecursionError):
        return True


def _stripped(body: bytes, names: frozenset[str]) -> bytes:
    """The body without these members. Of tools the client's own stay."""
    if "tools" not in names:
        return without(body, names)
    members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    try:
        own = [tool for tool in msgspec.json.decode(members["tools"], type=list[Any]) if not is_servers(tool)]
    except (msgspec.DecodeError, RecursionError):
        own = []
    if own:
        members["tools"] = msgspec.Raw(msgspec.json.encode(own))
        names -= {"tools"}
    else:
        names |= set(_WITH_TOOLS)
    return msgspec.json.encode({name: value for name, value in members.items() if name not in names})


def without(body: bytes, names: frozenset[str]) -> bytes:
    """The body without these members of its root, and as it came where it has none of them. "*" says nothing here:
    what a server of this wire would refuse is known to nobody but the server."""
    root = RootObject(body)
    if names.isdisjoint(root.spans):
        return body
    members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return msgspec.json.encode({name: value for name, value in members.items() if name not in names})
