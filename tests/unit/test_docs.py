"""The configuration page names every key, and no key that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from config import prices, providers, response_cache, routing, settings

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()
TABLES = {
    "server": settings.Server,
    "providers": providers.Provider,
    "providers.<name>.limits": providers.Limits,
    "providers.<name>.queue": providers.Queue,
    "providers.<name>.probe": providers.Probe,
    "routes": routing.Route,
    "routes.<model>.retry": routing.Retry,
    "routes.<model>.hedge": routing.Hedge,
    "breaker": routing.Breaker,
    "routes.<model>.cache": response_cache.ResponseCache,
    "billing": settings.Billing,
    "bounds": settings.Bounds,
    "metering": settings.Metering,
    "redis": settings.Redis,
    "embedded": settings.Embedded,
}


def section(name: str) -> str:
    """The part of the page about one table."""
    found = re.search(rf"^## `\[{re.escape(name)}[.\]].*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[0]


@pytest.mark.parametrize("name", TABLES)
def test_every_key_is_documented_and_every_documented_key_exists(name: str) -> None:
    rows = [line.split("|")[1] for line in section(name).splitlines() if line.startswith("| `")]
    assert sorted(key for row in rows for key in re.findall(r"`([a-z0-9_]+)`", row)) == sorted(
        TABLES[name].__struct_fields__
    )


def test_every_price_class_is_documented() -> None:
    text = section("prices")
    assert [name for name in prices.Price.__struct_fields__ if f"`{name}`" not in text] == []


def test_every_metric_is_documented_and_every_documented_metric_exists() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "operations.md").read_text()
    sources = [
        path.read_text() for package in ("gateway", "proxy", "metering") for path in (root / package).rglob("*.py")
    ]
    made = {name for text in sources for name in re.findall(r'"(tollgate_[a-z_]+)"', text)}
    assert made == set(re.findall(r"`(tollgate_[a-z_]+)[`{]", page))
