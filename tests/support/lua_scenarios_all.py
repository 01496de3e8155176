"""All scenarios: importing this module fills the list. Must not: define one."""

from __future__ import annotations

from tests.support import (
    lua_scenarios_ends,
    lua_scenarios_grants,
    lua_scenarios_holds,
    lua_scenarios_lines,
    lua_scenarios_rights,
)
from tests.support.lua_scenarios import SCENARIOS, fresh

__all__ = ["MODULES", "SCENARIOS", "fresh"]

MODULES = (lua_scenarios_holds, lua_scenarios_ends, lua_scenarios_grants, lua_scenarios_lines, lua_scenarios_rights)
"""Where they are defined."""
