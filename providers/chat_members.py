"""Members of a decoded JSON object, read once each and checked, with the names that an error tells.

Must not: know what the members mean.
"""

from __future__ import annotations

from typing import Any, NoReturn

from providers.codec import BadRequest


class Members:
    """The members of the object at `path` ("" for the root). Each read takes its member away; `left` is what nobody
    read. A null member reads as None, as an absent one does. All reads raise BadRequest for another type."""

    __slots__ = ("_path", "_values")

    def __init__(self, value: Any, path: str) -> None:
        self._path = path
        if not isinstance(value, dict):
            raise BadRequest(path or "body", f"'{path or 'body'}' must be an object.")
        self._values: dict[str, Any] = dict(value)

    def any(self, name: str) -> Any:
        """The member as given."""
        return self._values.pop(name, None)

    def text(self, name: str) -> str | None:
        """A string."""
        value = self._values.pop(name, None)
        return value if value is None or isinstance(value, str) else self.wrong(name, "a string")

    def needed(self, name: str) -> str:
        """A string that must be there."""
        value = self.text(name)
        return self.wrong(name, "a string") if value is None else value

    def flag(self, name: str) -> bool | None:
        """A boolean."""
        value = self._values.pop(name, None)
        return value if value is None or isinstance(value, bool) else self.wrong(name, "a boolean")

    def number(self, name: str) -> float | None:
        """A number, as it was written: an integer stays one."""
        value = self._values.pop(name, None)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        return self.wrong(name, "a number")

    def integer(self, name: str) -> int | None:
        """An integer; 5.0 is one."""
        value = self.number(name)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return value if value is None or isinstance(value, int) else self.wrong(name, "an integer")

    def object(self, name: str) -> dict[str, Any] | None:
        """An object as given."""
        value = self._values.pop(name, None)
        return value if value is None or isinstance(value, dict) else self.wrong(name, "an object")

    def members(self, name: str) -> Members | None:
        """An object, to be read."""
        value = self._values.pop(name, None)
        return None if value is None else Members(value, self.path(name))

    def list(self, name: str) -> list[Any] | None:
        """An array as given."""
        value = self._values.pop(name, None)
        return value if value is None or isinstance(value, list) else self.wrong(name, "an array")

    def path(self, name: str) -> str:
        """Where the member is in the request: `messages[0].content`."""
        return f"{self._path}.{name}" if self._path else name

    def left(self) -> dict[str, Any]:
        """What was not read, nulls too."""
        return self._values

    def wrong(self, name: str, expected: str) -> NoReturn:
        """Raise BadRequest for the member."""
        path = self.path(name)
        raise BadRequest(path, f"'{path}' must be {expected}.")
