"""Which providers are reached through httpx2's engine, and their pools: those with HTTP/2 or a proxy.

Must not: import the engine unless there is such a provider; read the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from config.settings import Secrets, Settings
from proxy.http_request import Origin
from proxy.transport import TransportLimits

if TYPE_CHECKING:
    from proxy.httpx_exchange import HttpxPool


def open_pools(
    settings: Settings, secrets: Secrets, base_urls: Mapping[str, str], limits: TransportLimits
) -> dict[str, HttpxPool]:
    """The pools by provider; the caller closes them. `base_urls` are the providers that the supervisor started itself:
    they are spoken to directly."""
    pools: dict[str, HttpxPool] = {}
    for name, provider in settings.providers.items():
        proxy = secrets.proxies.get(name)
        if name in base_urls or not (provider.http2 or proxy is not None):
            continue
        from proxy.httpx_exchange import HttpxPool

        pools[name] = HttpxPool(Origin.from_url(provider.base_url), limits, http2=provider.http2, proxy=proxy)
    return pools
