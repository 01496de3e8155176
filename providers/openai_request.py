"""What differs between servers of OpenAI's wire on the way up: Azure's addresses, and members that a server refuses.

Must not: change a member that goes up.
"""

from __future__ import annotations

from urllib.parse import quote

import msgspec

from providers.codec import ChatCall, Upstream
from providers.json_root import RootObject


def azure_target(upstream: Upstream, call: ChatCall) -> bytes:
    """`/openai/v1/chat/completions`, or `/openai/deployments/<model>/chat/completions` where the base is no `/v1`, each
    with the `api-version` that is configured. A base that names a deployment itself is kept.
    Source: Azure OpenAI's REST reference and "API version lifecycle"."""
    base, version = upstream.target, upstream.options.get("api_version")
    if not base.endswith(b"/v1") and b"/deployments/" not in base:
        base = b"%b/deployments/%b" % (base, quote(call.model, safe="").encode())
    query = b"" if version is None else b"?api-version=" + quote(version, safe="").encode()
    return base + b"/chat/completions" + query


def without(body: bytes, names: frozenset[str]) -> bytes:
    """The body without these members of its root, and as it came where it has none of them. "*" says nothing here:
    what a server of this wire would refuse is known to nobody but the server."""
    root = RootObject(body)
    if names.isdisjoint(root.spans):
        return body
    members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return msgspec.json.encode({name: value for name, value in members.items() if name not in names})
