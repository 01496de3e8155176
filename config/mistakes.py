"""What is said of a value of the configuration file that has the wrong type, name or choice.

Must not: check anything itself; `msgspec` has refused the file already.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STEP = re.compile(r"\.([A-Za-z0-9_]+)|\[[^\]]*\]")
_QUOTED = re.compile(r"`([^`]*)`")
_WORDS = {"object": "table", "array": "list"}
_ENTRIES = "[...]"
_FIELDS_SHOWN = 12


def told(message: str, raw: Mapping[str, Any], root: type[msgspec.Struct]) -> str:
    """`msgspec`'s message about `raw`, which is no `root`: the key first, with the names that stand in the file, and
    what would be right as far as that is known."""
    text, _, place = message.partition(" - at `$")
    place = place.strip("`")
    key = _named(raw, place, root).lstrip(".") or "the file"
    kind = _at(root, place)
    text = text[0].lower() + text[1:].replace(" | null", "")
    for name, word in _WORDS.items():
        text = text.replace(f"`{name}`", f"`{word}`")
    if text.startswith("object "):
        text = f"table {text.removeprefix('object ')}"
    if "unknown field" in text:
        return f"{key}: {text}. {_spelling(text, raw, key, kind)}"
    if "invalid enum value" in text:
        return f"{key}: {text}. Use one of {', '.join(_choices(kind))}."
    return f"{key}: {text}."


def shown(key: str) -> str:
    """A key as TOML writes it."""
    return key if _BARE.fullmatch(key) else f'"{key}"'


def _named(raw: Any, place: str, kind: Any) -> str:
    """The path with the names of entries in the place of `[...]`: those of the first that is refused."""
    before, entries, after = place.partition(_ENTRIES)
    if not entries:
        return place
    table, of = _value(raw, before), _at(kind, before + _ENTRIES)
    for name, entry in table.items() if isinstance(table, dict) else ():
        try:
            msgspec.convert(entry, of)
        except msgspec.ValidationError:
            return f"{before}.{shown(name)}{_named(entry, after, of)}"
    return place


def _value(raw: Any, place: str) -> Any:
    for name in place.split(".")[1:]:
        raw = raw.get(name) if isinstance(raw, dict) else None
    return raw


def _at(kind: Any, place: str) -> Any:
    """The type at a path of `msgspec`."""
    for step in _STEP.finditer(place):
        name = step[1]
        if name is None:
            inner = [part for part in _parts(kind) if get_origin(part) in (dict, tuple)]
            kind = get_args(inner[0])[1 if get_origin(inner[0]) is dict else 0] if inner else Any
        else:
            struct = _struct(kind)
            kind = Any if struct is None else get_type_hints(struct).get(name, Any)
    return kind


def _parts(kind: Any) -> Iterator[Any]:
    """A type, or the members of a union."""
    if get_origin(kind) in (dict, tuple, Literal) or not get_args(kind):
        yield kind
    else:
        for each in get_args(kind):
            yield from _parts(each)


def _struct(kind: Any) -> type[msgspec.Struct] | None:
    return next((part for part in _parts(kind) if isinstance(part, type) and issubclass(part, msgspec.Struct)), None)


def _choices(kind: Any) -> list[str]:
    return [str(value) for part in _parts(kind) if get_origin(part) is Literal for value in get_args(part)]


def _spelling(text: str, raw: Mapping[str, Any], key: str, kind: Any) -> str:
    found, struct = _QUOTED.search(text), _struct(kind)
    if found is not None and struct is not None:
        name = found[1]
        if near := get_close_matches(name, struct.__struct_fields__, 1):
            return f"Did you mean `{near[0]}`?"
        if isinstance(_value(raw, f".{key}.{name}"), dict):
            table, _, entry = key.rpartition(".")
            return f'A name with a dot is written in quotes, [{table}."{entry}.{name}"]; else remove it.'
        if len(struct.__struct_fields__) <= _FIELDS_SHOWN:
            return f"It knows {', '.join(struct.__struct_fields__)}."
    return "Remove it or correct its spelling."
