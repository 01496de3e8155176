"""Tools as the text that models are shown, which is what they cost in a prompt, and the size of any JSON in one. Pure.

Must not: raise for any decoded JSON, or follow a schema deeper than `DEPTH_MAX`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from metering.token_counter import utf8_bytes

DEPTH_MAX: Final = 64
"""Nesting that the renderer of tools follows; deeper parts count as `any`."""


def prompt_bytes(value: object) -> int:
    """UTF-8 bytes of all text inside decoded JSON, roughly its size on the wire: lets the caller decide whether to
    count on the event loop or beside it. Keys count too; numbers and the like as 4."""
    total = 0
    rest: list[object] = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            total += utf8_bytes(item)
        elif isinstance(item, Mapping):
            rest.extend(item.keys())
            rest.extend(item.values())
        elif isinstance(item, list | tuple):
            rest.extend(item)
        else:
            total += 4
    return total


def render_tools(tools: object, functions: object = None) -> str:
    """The tools as the TypeScript namespace that the models are shown; "" without any."""
    listed = [*(tools if isinstance(tools, list) else []), *(functions if isinstance(functions, list) else [])]
    lines = [line for tool in listed for line in _tool_lines(tool)]
    if not lines:
        return ""
    return "\n".join(("namespace functions {", "", *lines, "} // namespace functions"))


def _tool_lines(tool: object) -> Sequence[str]:
    if not isinstance(tool, Mapping):
        return (_plain(tool), "")
    function = tool.get("function") or tool.get("custom") or tool
    if not isinstance(function, Mapping):
        return (_plain(function), "")
    lines = _comment(function.get("description"))
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    name = function.get("name")
    if isinstance(properties, Mapping) and properties:
        lines += [f"type {_plain(name)} = (_: {{", *_property_lines(parameters, DEPTH_MAX), "}) => any;", ""]
    else:
        lines += [f"type {_plain(name)} = () => any;", ""]
    for key in ("$defs", "definitions"):
        shared = parameters.get(key) if isinstance(parameters, Mapping) else None
        if isinstance(shared, Mapping):
            lines += [_type(one, DEPTH_MAX) for one in shared.values()]
    return [*lines, _plain(function["format"])] if "format" in function else lines


def _plain(value: object) -> str:
    """A scalar as written. Anything else as filler of half its bytes in words: an over-estimate that cannot fail."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool | float):
        return str(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() < 256 else "9" * (value.bit_length() // 3)
    return "? " * (prompt_bytes(value) // 2 + 1)


def _comment(text: object) -> list[str]:
    return [f"// {line}" for line in text.splitlines()] if isinstance(text, str) else []


def _property_lines(schema: Any, depth: int) -> list[str]:
    """`schema` is an object schema with a mapping of properties."""
    required = schema.get("required")
    needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    lines: list[str] = []
    for name, one in schema["properties"].items():
        if isinstance(one, Mapping):
            lines += _comment(one.get("description"))
        default = f" // default: {_plain(one['default'])}" if isinstance(one, Mapping) and "default" in one else ""
        lines.append(f"{name}{'' if name in needed else '?'}: {_type(one, depth - 1)},{default}")
    return lines


def _type(schema: object, depth: int) -> str:
    if not isinstance(schema, Mapping) or depth <= 0:
        return "any"
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list):
            return " | ".join(_type(one, depth - 1) for one in schema[key])
    if isinstance(schema.get("enum"), list):
        return " | ".join(f'"{one}"' if isinstance(one, str) else _plain(one) for one in schema["enum"])
    if "$ref" in schema:
        return _plain(schema["$ref"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(_plain(one) for one in kind)
    if kind == "array":
        return f"{_type(schema.get('items'), depth - 1)}[]"
    if kind == "object" and isinstance(schema.get("properties"), Mapping):
        return "\n".join(("{", *_property_lines(schema, depth), "}"))
    return "number" if kind == "integer" else _plain(kind or "any")
