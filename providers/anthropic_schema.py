"""JSON schemas as Anthropic's structured outputs take them.

Must not: weaken a schema silently. A constraint that cannot be enforced there becomes a sentence of the description,
which is what Anthropic's own SDKs do with it. Source: platform.claude.com/docs/en/build-with-claude/structured-outputs
("JSON Schema limitations", "How SDK transformation works").
"""

from __future__ import annotations

from typing import Any

import msgspec

from providers.chat_request import BadRequest

DEPTH_MAX = 128
_FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid"))
_UNENFORCED = frozenset(
    (
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength"),
        *("maxItems", "uniqueItems", "contains", "minContains", "maxContains", "prefixItems", "unevaluatedProperties"),
        *("minProperties", "maxProperties", "patternProperties", "propertyNames", "dependentRequired"),
        *("dependentSchemas", "if", "then", "else", "not"),
    )
)
_LISTS = ("anyOf", "allOf")
_NAMED = ("properties", "$defs", "definitions")


def output_schema(schema: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """`schema` with closed objects, `oneOf` as `anyOf`, and what cannot be enforced in its descriptions."""
    if depth > DEPTH_MAX:
        raise BadRequest("response_format.json_schema.schema", "The schema nests too deeply.")
    out: dict[str, Any] = {}
    told: list[str] = []
    for name, value in schema.items():
        if name == "oneOf":
            out["anyOf"] = _each(value, depth)
        elif name in _LISTS:
            out[name] = _each(value, depth)
        elif name in _NAMED and isinstance(value, dict):
            out[name] = {key: _inner(inner, depth) for key, inner in value.items()}
        elif name == "items":
            out[name] = _inner(value, depth)
        elif _enforced(name, value):
            out[name] = value
        elif value is not False:
            told.append(f"{name}: {msgspec.json.encode(value).decode()}")
    if schema.get("type") == "object" or "properties" in schema:
        out["additionalProperties"] = False
    if told:
        note = "{" + ", ".join(told) + "}"
        described = out.get("description")
        out["description"] = f"{described}\n\n{note}" if isinstance(described, str) and described else note
    return out


def _enforced(name: str, value: Any) -> bool:
    if name == "minItems":
        return value in (0, 1)
    if name == "format":
        return isinstance(value, str) and value in _FORMATS
    return name not in _UNENFORCED


def _each(value: Any, depth: int) -> Any:
    return [_inner(inner, depth) for inner in value] if isinstance(value, list) else value


def _inner(value: Any, depth: int) -> Any:
    return output_schema(value, depth + 1) if isinstance(value, dict) else value
