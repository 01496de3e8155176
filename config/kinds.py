"""Kinds of providers: what really differs between them, one row each. `[providers.<name>] kind` names a row.

Whatever the provider's table says itself wins over its row. A server with OpenAI's wire that has no row is `generic`.
Must not: read the environment, or know the tables of the configuration file. Checked against the providers' own
documentation and recorded traffic, November 2026.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, Protocol

import msgspec

Limit = Literal["max_tokens", "max_completion_tokens"]
KeyStyle = Literal["bearer", "api-key"]
Continuation = Literal["prefill", "prefix", "continue_final", "instruction"]


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """One row.

    `codec`: whose wire it speaks (`providers.registry`). `base_url`: where it is, with `{option}` for what its options
    say; None where every customer has an address of his own. `api_key_env`: the variable that its own clients read; it
    counts only for the kind's own address, so that a key never goes to a server that it is not for. `prices`: its id in
    genai-prices. `include_usage`: whether streams are asked for usage. `clean_eof`: whether a stream may end without a
    finish. `limit_field`: the only output limit it understands. `drop`: fields without an effect on the answer that it
    would refuse. `refused`: fields that buy more than the price covers, or set a limit again (of `tools`, the server's
    own; `providers.refused` knows which values of the others buy nothing). `caseless`: whether the server reads fields'
    names in any case, or nobody knows that it does not. `key_style`: the header of a key, where the codec has more than
    one. `continuation`: how it is asked to go on with a text that broke off (`providers.continuation` knows why).
    `options`: names of `[providers.<name>.options]`, and whether each must be given where there is no `base_url`.
    """

    codec: Literal["openai", "anthropic", "gemini", "bedrock"] = "openai"
    base_url: str | None = None
    api_key_env: str | None = None
    prices: str | None = None
    include_usage: bool = True
    clean_eof: bool = False
    limit_field: Limit | None = None
    drop: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    caseless: bool = False
    key_style: KeyStyle = "bearer"
    continuation: Continuation = "instruction"
    options: Mapping[str, bool] = {}


_SAID_ELSEWHERE = ("max_completion_tokens", "stream_options")
"""What the gateway says otherwise: the limit by its other name, and usage that comes unasked."""
_BILLED = ("service_tier", "tools", "web_search_options")
"""What providers of OpenAI's wire bill above or beside the tokens: a faster queue, tools that they run, searches."""
_ROUTED = ("models", "route", "provider", "preset", "plugins")
"""Who answers instead, at whose price, and with what beside it (openrouter.ai/docs: model and provider routing)."""
_WITH_DATA = ("data_sources", "dataSources", "enhancements")
"""Searches in other services, with the resource's own rights, and readings of images (Azure OpenAI's reference)."""
_SEARCHED = ("search_parameters", "deferred")
"""Live Search, billed by its sources, and answers that are billed and fetched elsewhere (docs.x.ai)."""
_MORE_OUTPUT = ("n_predict", "n_cmpl", "n_probs", "best_of", "use_beam_search", "generation_config")
"""Other names of the output limit and of `n`, which win over those, and work that no token shows (llama.cpp's
server-schema.cpp, vLLM's protocol, `transformers serve`)."""

KINDS: Mapping[str, Kind] = {
    "openai": Kind(
        base_url="https://api.openai.com/v1", api_key_env="OPENAI_API_KEY", prices="openai", refused=_BILLED
    ),
    # Both of its URL forms, see `_azure`. A model is the name of a deployment.
    "azure": Kind(
        api_key_env="AZURE_OPENAI_API_KEY",
        prices="azure",
        refused=(*_BILLED, *_WITH_DATA),
        caseless=True,
        key_style="api-key",
        options={"api_version": False, "auth": False},
    ),
    "openrouter": Kind(
        base_url="https://openrouter.ai/api/v1",
        api_key_env="OPENROUTER_API_KEY",
        prices="openrouter",
        refused=(*_BILLED, *_ROUTED),
    ),
    # `compound_custom` chooses models and tools of its systems.
    "groq": Kind(
        base_url="https://api.groq.com/openai/v1",
        api_key_env="GROQ_API_KEY",
        prices="groq",
        refused=(*_BILLED, "compound_custom"),
        caseless=True,
    ),
    "deepseek": Kind(
        base_url="https://api.deepseek.com/v1",
        api_key_env="DEEPSEEK_API_KEY",
        prices="deepseek",
        limit_field="max_tokens",
        refused=_BILLED,
    ),
    # It refuses members that it does not know (422 extra_forbidden), and sends usage with the finish.
    "mistral": Kind(
        base_url="https://api.mistral.ai/v1",
        api_key_env="MISTRAL_API_KEY",
        prices="mistral",
        include_usage=False,
        limit_field="max_tokens",
        drop=(*_SAID_ELSEWHERE, "store", "user", "service_tier", "safety_identifier"),
        refused=_BILLED,
        continuation="prefix",
    ),
    "together": Kind(
        base_url="https://api.together.xyz/v1",
        api_key_env="TOGETHER_API_KEY",
        prices="together",
        limit_field="max_tokens",
        refused=(*_BILLED, "safety_model"),  # a second model, which reads all of it
        caseless=True,
    ),
    "xai": Kind(
        base_url="https://api.x.ai/v1",
        api_key_env="XAI_API_KEY",
        prices="x-ai",
        refused=(*_BILLED, *_SEARCHED),
    ),
    # Written in Go, whose JSON reader takes "MAX_TOKENS" for max_tokens.
    "ollama": Kind(
        base_url="http://127.0.0.1:11434/v1", limit_field="max_tokens", caseless=True, continuation="prefill"
    ),
    # `kv_transfer_params` names a host that it would fetch from.
    "vllm": Kind(
        base_url="http://127.0.0.1:8000/v1",
        refused=("best_of", "use_beam_search", "kv_transfer_params"),
        continuation="continue_final",
    ),
    # llama-server knows max_completion_tokens only since 2026, llama-cpp-python ignores it.
    "llamacpp": Kind(
        base_url="http://127.0.0.1:8080/v1",
        limit_field="max_tokens",
        refused=("n_predict", "n_cmpl", "n_probs"),
        continuation="continue_final",
    ),
    # `transformers serve` refuses the members that it does not implement; it sends usage unasked, and no [DONE].
    "transformers": Kind(
        base_url="http://127.0.0.1:8000/v1",
        include_usage=False,
        limit_field="max_tokens",
        drop=(*_SAID_ELSEWHERE, "store", "user", "service_tier", "metadata", "prediction"),
        refused=("generation_config",),
    ),
    # It may be any of them: what one of them bills is refused until `refuse` says otherwise.
    "generic": Kind(
        refused=(
            *(*_BILLED, *_ROUTED, *_WITH_DATA, *_SEARCHED, *_MORE_OUTPUT),
            *("compound_custom", "safety_model", "kv_transfer_params"),
            *("max_new_tokens", "max_output_tokens", "max_length", "num_predict", "num_return_sequences"),
        ),
        caseless=True,
    ),
    "anthropic": Kind(
        codec="anthropic",
        base_url="https://api.anthropic.com/v1",
        api_key_env="ANTHROPIC_API_KEY",
        prices="anthropic",
        include_usage=False,
        key_style="api-key",
        continuation="prefill",
        options={"version": False, "beta": False, "auth": False, "thinking": False},
    ),
    "gemini": Kind(
        codec="gemini",
        base_url="https://generativelanguage.googleapis.com/v1beta",
        api_key_env="GEMINI_API_KEY",
        prices="google",
        include_usage=False,
    ),
    # The key is an OAuth access token.
    "vertex": Kind(
        codec="gemini",
        base_url="https://{region}-aiplatform.googleapis.com/v1/projects/{project}/locations/{region}/publishers/google",
        api_key_env="VERTEX_ACCESS_TOKEN",
        prices="google",
        include_usage=False,
        options={"region": True, "project": True},
    ),
    # The key is a bearer key of Bedrock, or ACCESS_KEY_ID:SECRET[:SESSION_TOKEN], with which requests are signed.
    "bedrock": Kind(
        codec="bedrock",
        base_url="https://bedrock-runtime.{region}.amazonaws.com",
        api_key_env="AWS_BEARER_TOKEN_BEDROCK",
        prices="aws",
        include_usage=False,
        refused=("guardrailConfig", "guardrail_config"),  # billed by the text that it reads
        options={"region": True, "family": False, "thinking": False},
    ),
}

FAMILIES = ("anthropic", "openai", "amazon", "meta", "mistral", "cohere", "ai21", "deepseek", "qwen")
"""Whose models Bedrock has, as far as their own fields are known (`providers.bedrock_fields`)."""
_OPTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:,-]*")
_OPTION_CHARS_MAX = 256
_FORMS: Mapping[str, tuple[re.Pattern[str], str]] = {
    # A region stands in a host's name.
    "region": (
        re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"),
        "empty, or with characters that do not belong there",
    ),
    "auth": (re.compile(r"bearer|api-key"), 'write "api-key" or "bearer"'),
    "thinking": (re.compile(r"adaptive|budget"), 'write "adaptive" or "budget"'),
    "family": (re.compile("|".join(FAMILIES)), f"use one of {', '.join(FAMILIES)}"),
    "version": (re.compile(r"\d{4}-\d\d-\d\d"), 'write a date, such as "2023-06-01"'),
    "api_version": (
        re.compile(r"\d{4}-\d\d-\d\d(?:-preview)?|v1|latest|preview"),
        'write a date, such as "2024-10-21" or "2025-04-01-preview", or "preview"',
    ),
    "beta": (re.compile(r"[a-z0-9][a-z0-9.-]*(?:,[a-z0-9][a-z0-9.-]*)*"), "write names with commas, without blanks"),
}
"""What an option may be where not every text makes sense, and what to do about another."""
_NEEDED = frozenset(("model", "messages", "stream", "n"))
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?(?P<path>/[!-~]*)?"
)
_DATED = re.compile(r"\d{4}-\d\d-\d\d")


class Table(Protocol):
    """What a provider's table says, as far as a kind has to do with it. Empty or None: not said."""

    @property
    def kind(self) -> str: ...
    @property
    def base_url(self) -> str: ...
    @property
    def insecure(self) -> bool: ...
    @property
    def api_key_env(self) -> str | None: ...
    @property
    def include_usage(self) -> bool | None: ...
    @property
    def clean_eof(self) -> bool | None: ...
    @property
    def limit_field(self) -> Limit | None: ...
    @property
    def price_provider(self) -> str | None: ...
    @property
    def drop_unsupported(self) -> tuple[str, ...] | None: ...
    @property
    def continuation(self) -> Continuation | None: ...
    @property
    def refuse(self) -> tuple[str, ...] | None: ...
    @property
    def options(self) -> Mapping[str, str]: ...


def resolved(table: Table) -> dict[str, object]:
    """The values of all those fields: the table's own, else its kind's. Nothing for a kind that does not exist, and no
    address where options that it needs are missing (`check` names them)."""
    kind = KINDS.get(table.kind)
    if kind is None:
        return {}
    own_address = bool(table.base_url)
    key_env = table.api_key_env
    if key_env is None and (kind.base_url is None or not own_address):
        key_env = kind.api_key_env
    return {
        "base_url": _azure(table) if table.kind == "azure" else table.base_url or _address(table.kind, kind, table),
        "api_key_env": key_env,
        "include_usage": kind.include_usage if table.include_usage is None else table.include_usage,
        "clean_eof": kind.clean_eof if table.clean_eof is None else table.clean_eof,
        "limit_field": table.limit_field or kind.limit_field,
        "price_provider": table.price_provider or kind.prices,
        "drop_unsupported": kind.drop if table.drop_unsupported is None else table.drop_unsupported,
        "continuation": table.continuation or kind.continuation,
        "refuse": kind.refused if table.refuse is None else table.refuse,
    }


def _address(name: str, kind: Kind, table: Table) -> str:
    if kind.base_url is None or any(needed and option not in table.options for option, needed in kind.options.items()):
        return ""
    url = kind.base_url
    if name == "vertex" and table.options["region"] == "global":
        url = url.replace("{region}-", "", 1)  # the global endpoint's host has no region
    return url.format(**table.options)


def _azure(table: Table) -> str:
    """A resource's address alone is completed: a dated `api_version` means the path of deployments, else the newer form
    under /openai/v1. Source: Azure OpenAI, "API version lifecycle"."""
    url = table.base_url.rstrip("/")
    if re.fullmatch(r"https?://[^/]+", url) is None:
        return url
    return f"{url}/openai" if _DATED.match(table.options.get("api_version", "")) else f"{url}/openai/v1"


def key_style(table: Table) -> KeyStyle:
    """How the key is sent: the option `auth`, else the kind's way. "api-key" is the header that the kind's own clients
    use (`api-key` at Azure, `x-api-key` at Anthropic)."""
    said = table.options.get("auth")
    return KINDS[table.kind].key_style if said is None else "bearer" if said == "bearer" else "api-key"


def caseless(kind: str) -> bool:
    """Whether servers of a kind may read fields' names in any case."""
    return KINDS[kind].caseless


def speaks(kind: str) -> str:
    """The codec of a kind; "" for one that does not exist."""
    row = KINDS.get(kind)
    return "" if row is None else row.codec


def is_loopback(host: str) -> bool:
    """Whether a listening or upstream host is this machine's own loopback."""
    return host in ("localhost", "::1") or host.startswith("127.")


def check(table: Table) -> None:
    """Raises ValueError, which begins with the key at fault, for a resolved table that cannot be used."""
    kind = KINDS.get(table.kind)
    if kind is None:
        raise ValueError(f"kind: '{table.kind[:64]}' is not a kind of provider. Use one of {', '.join(sorted(KINDS))}.")
    for name, value in table.options.items():
        _check_option(table.kind, kind, name, value)
    if not table.base_url:
        missing = [name for name, needed in kind.options.items() if needed and name not in table.options]
        if missing:
            raise ValueError(f"options.{missing[0]}: the kind '{table.kind}' needs it, or a base_url.")
        raise ValueError(f"base_url: the kind '{table.kind}' has no address of its own. Name the server's.")
    _check_url(table)
    if table.kind == "azure" and not table.base_url.rstrip("/").endswith("/v1") and "api_version" not in table.options:
        raise ValueError("options.api_version: the path of deployments needs it. Set it, or let base_url end in /v1.")
    _check_drop(table)
    for name in table.refuse or ():
        if name in ("model", "messages"):
            raise ValueError(f"refuse: '{name}' is in every request. Remove it from the list.")


def _check_url(table: Table) -> None:
    # The URL itself is not repeated: it may hold a password or a key by mistake.
    found = _URL.fullmatch(table.base_url)
    if found is None or set("?#@") & set(table.base_url) or not 0 < int(found["port"] or 1) < 65_536:
        raise ValueError(
            "base_url: not an http(s) URL of a host, a port and a path. "
            "Write https://host:443/v1, without user, query or fragment."
        )
    host = found["host"].strip("[]")
    if found["scheme"] == "http" and not is_loopback(host) and not table.insecure:
        raise ValueError(f"base_url: plain http to {host}. Use https, or set insecure = true to accept it.")


def _check_option(kind_name: str, kind: Kind, name: str, value: str) -> None:
    if name not in kind.options:
        known = f"It knows {', '.join(kind.options)}." if kind.options else "It has none."
        raise ValueError(f"options.{name[:64]}: the kind '{kind_name}' has no such option. {known}")
    form, fix = _FORMS.get(name, (_OPTION, "empty, or with characters that do not belong there"))
    if not form.fullmatch(value) or len(value) > _OPTION_CHARS_MAX:
        raise ValueError(f"options.{name}: {fix}.")


def _check_drop(table: Table) -> None:
    """The gateway itself needs some fields: what is asked for, and the limit that the hold covers."""
    needed = _NEEDED | {table.limit_field or "max_tokens"}
    if table.limit_field is None:
        needed |= {"max_completion_tokens"}
    for name in table.drop_unsupported or ():
        if name in needed:
            raise ValueError(f"drop_unsupported: '{name}' is needed. Remove it from the list.")
