"""Providers' lists of models: how one is asked for, what is in it, and whether it says that a model is not there.

Pure. Must not: do I/O, or call a model missing that might be served. Aliases, variants and fine-tunes are often served
without being listed, and some servers take any name: where it is not certain, a model counts as there.

Sources: the references of OpenAI (`GET /models`), Anthropic (`GET /v1/models`, pages by `after_id`), Gemini
(`models.list`, pages by `pageToken`), xAI (`GET /v1/language-models`, which unlike its `/v1/models` has the aliases),
Together (a bare array), Ollama (`:latest` is implied) and OpenRouter (variants after a colon).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

import msgspec

from providers.codec import Upstream, UpstreamRequest

PAGES_MAX = 10
"""Pages of one list that are read. OpenAI's wire has one, the others' first holds a thousand models."""
MODELS_MAX = 5_000
"""Models of one list that are known."""

_HEADERS = ((b"accept", b"application/json"), (b"accept-encoding", b"identity"), (b"user-agent", b"tollgate"))
_ANTHROPIC_VERSION = b"2023-06-01"
_UNREADABLE = (msgspec.DecodeError, RecursionError, ValueError)
NO_LIST = frozenset(("azure", "vertex", "bedrock"))
"""Kinds that list what could be deployed or subscribed to, not what can be called."""
_ANY_NAME = frozenset(("llamacpp", "transformers"))
"""Kinds that answer with their one model whatever the name, or load any model that is asked for."""
_KEY_NEEDED = frozenset(("openai", "groq", "deepseek", "mistral", "together", "xai", "anthropic", "gemini"))
"""Kinds whose list is shown to a valid key only. OpenRouter's and llama-server's are public; of other servers nobody
knows."""


class ModelPage(msgspec.Struct, frozen=True):
    """One page. `ids` are all names in it, aliases too, without Gemini's `models/`; `next` is the query of the next
    page, None on the last one."""

    ids: tuple[str, ...]
    next: bytes | None = None


class Names(msgspec.Struct, frozen=True):
    """What `has` looks names up in: `exact` as listed, `plain` without a snapshot's date where they name no snapshot
    of their own, `stems` all of them without. `size`: how many were listed."""

    exact: frozenset[str]
    plain: frozenset[str]
    stems: frozenset[str]
    size: int


class _Row(msgspec.Struct, gc=False):
    id: Any = None
    name: Any = None
    canonical_slug: Any = None
    aliases: Any = None


class _Page(msgspec.Struct, rename={"next_token": "nextPageToken"}, gc=False):
    object: Any = None
    data: list[_Row | str] | None = None
    models: list[_Row | str] | None = None
    has_more: Any = None
    last_id: Any = None
    next_token: Any = None


_decode_page = msgspec.json.Decoder(_Page).decode
_decode_rows = msgspec.json.Decoder(list[_Row | str]).decode


def list_request(upstream: Upstream, page: bytes | None = None) -> UpstreamRequest | None:
    """GET of the list, or of the `page` that `ModelPage.next` named. None where the provider has no list that says
    which models can be called."""
    if upstream.kind in NO_LIST:
        return None
    path, query = _address(upstream.kind)
    query = b"&".join(part for part in (query, page) if part)
    target = upstream.target + path + (b"?" + query if query else b"")
    return UpstreamRequest(b"GET", target, (*_HEADERS, *_own(upstream)), (), b"")


def read_list(kind: str, body: bytes) -> ModelPage | None:
    """What a 200 says; None when it is no list of models."""
    try:
        if body.lstrip()[:1] == b"[":
            return ModelPage(tuple(_ids(_decode_rows(body))))
        page = _decode_page(body)
    except _UNREADABLE:
        return None
    rows = [*(page.data or ()), *(page.models or ())]
    if page.data is None and page.models is None and page.object != "list":  # Ollama without models: `data` is null
        return None if kind != "gemini" or body.strip() != b"{}" else ModelPage(())
    return ModelPage(tuple(_ids(rows)), _next(kind, page))


def names(ids: Iterable[str]) -> Names:
    """The names of all pages, for `has`."""
    exact = frozenset(map(_bare, ids))
    stems = {name: _SNAPSHOT.sub("", name) for name in exact}
    plain = frozenset(stem for name, stem in stems.items() if not _pinned(name, stem))
    return Names(exact, plain, frozenset(stems.values()), len(exact))


def has(known: Names, model: str) -> bool:
    """Whether a model of this name may be there; False only when the list speaks against it.

    A snapshot (`gpt-4o-2024-08-06`) is there when it is listed, or the name without the date is; an alias (`gpt-4o`,
    `claude-opus-4-0`, `...-latest`) when any snapshot of it is; a variant (`:free`, `:nitro`) when its model is.
    """
    name = _bare(model)
    if name in known.exact or _UNLISTED.search(name) or not known.size:
        return True
    base = _VARIANT.sub("", name)
    if base != name:
        return has(known, base)
    stem = _SNAPSHOT.sub("", name)
    if stem in (known.plain if _pinned(name, stem) else known.stems):
        return True
    return any(listed.endswith("*") and name.startswith(listed[:-1]) for listed in known.exact)


def decides(kind: str, known: Names) -> bool:
    """Whether a list of this kind of provider says that other names are not served. Not an empty one, and not that of a
    server that takes any name: many servers of a single model do (TGI, SGLang, llama-cpp-python)."""
    if kind in _ANY_NAME or not known.size:
        return False
    return kind != "generic" or known.size > 1


def proves_key(upstream: Upstream) -> bool:
    """Whether a list that came means that the key is accepted."""
    return upstream.key is not None and upstream.kind in _KEY_NEEDED


def _address(kind: str) -> tuple[bytes, bytes]:
    if kind == "anthropic":
        return b"/models", b"limit=1000"
    if kind == "gemini":
        return b"/models", b"pageSize=1000"
    return (b"/language-models" if kind == "xai" else b"/models"), b""


def _own(upstream: Upstream) -> tuple[tuple[bytes, bytes], ...]:
    """The key, and the version that Anthropic wants, as the kind's codec sends them."""
    key = None if upstream.key is None else upstream.key.encode()
    if upstream.kind == "gemini":
        return () if key is None else ((b"x-goog-api-key", key),)
    if upstream.kind == "anthropic":
        version = upstream.options.get("version", "").encode() or _ANTHROPIC_VERSION
        own = ((b"anthropic-version", version),)
        if key is None:
            return own
        bearer = upstream.options.get("auth") == "bearer"
        return (*own, (b"authorization", b"Bearer " + key) if bearer else (b"x-api-key", key))
    if key is None:
        return ()
    return ((b"authorization", b"Bearer " + key) if upstream.key_style == "bearer" else (b"api-key", key),)


def _ids(rows: Iterable[_Row | str]) -> Iterable[str]:
    for row in rows:
        if isinstance(row, str):
            found: list[Any] = [row]
        else:
            aliases = row.aliases if isinstance(row.aliases, list) else []
            found = [row.id, row.name, row.canonical_slug, *aliases]
        for name in found:
            if isinstance(name, str) and name:
                yield name.removeprefix("models/")


def _next(kind: str, page: _Page) -> bytes | None:
    if isinstance(page.next_token, str) and page.next_token:
        return b"pageToken=" + quote(page.next_token, safe="").encode()
    if page.has_more is True:
        last = page.last_id if isinstance(page.last_id, str) else ""
        return (b"after_id=" if kind == "anthropic" else b"after=") + quote(last, safe="").encode()
    return None


# -- names -------------------------------------------------------------------------------------------------------------

_PREFIX = re.compile(r"^(?:models/|(?:registry\.ollama\.ai/)?library/)")
_SNAPSHOT = re.compile(
    r"[-@](?:latest|0"  # claude-opus-4-0 is an alias of claude-opus-4-20250514
    r"|(?:preview-|exp-)?(?:\d{4}-\d\d-\d\d|\d\d-\d\d(?:-\d{4})?|\d\d-\d{4})"  # 2024-08-06; 05-20, 09-2025; 08-2024
    r"|\d{8}|\d{6}|\d{3,4})$"  # 20250514; 240615; 0613, 001
)
_ALIAS = re.compile(r"-(?:latest|0)$")
_VARIANT = re.compile(r":(?:[a-z][a-z-]*|[^:]*=[^:]*)$")
"""`:free`, `:nitro` (OpenRouter), `:fireworks-ai` (Hugging Face), `:option=value`; not Ollama's `:8b`."""
_UNLISTED = re.compile(
    r"^ft:|^tunedmodels/"  # fine-tunes: OpenAI lists them without their checkpoints, Gemini in another list
    r"|^accounts/(?!fireworks/)|#"  # Fireworks' own models and deployments of its customers
    r"|^ep-\d|^@|/@"  # Volcano's endpoints, OpenRouter's presets
)


def _bare(name: str) -> str:
    """Lower case (Ollama's and others' names have none), without folder and Ollama's implied tag."""
    return _PREFIX.sub("", name.strip().lower()).removesuffix(":latest")


def _pinned(name: str, stem: str) -> bool:
    """Whether it names one snapshot, rather than whichever is current."""
    return stem != name and _ALIAS.search(name) is None
