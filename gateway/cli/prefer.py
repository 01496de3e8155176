"""What the commands `prefer` of accounts and keys share: the options, how preferences are shown, and warnings.

Must not: hold a rule of preferences (`accounts.preferences` has them) or refuse a provider that is not configured.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gateway.cli.output import note

if TYPE_CHECKING:
    from accounts.preferences import RoutingPreferences
    from config.settings import Settings

Command = TypeVar("Command", bound=Callable[..., object])
Lists = dict[str, tuple[str, ...]]
"""The lists that were given, by their names in RoutingPreferences; an empty one takes that list away."""

_OPTIONS = {
    "allowed": ("--allow", "Only these may answer."),
    "excluded": ("--exclude", "These may not answer."),
    "preferred": ("--prefer", "These are tried first, in this order."),
    "tags": ("--tag", "Only providers with all these tags (data policies) may answer."),
}


class NamesType(click.ParamType[tuple[str, ...]]):
    """Names with commas between them, such as `a,b`, for one list of preferences; nothing is the empty list."""

    name = "names"

    def __init__(self, of: str) -> None:
        self._of = of

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Text to names; names pass."""
        from accounts.preferences import checked

        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")] if str(value).strip() else []
        try:
            return checked(self._of, words)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


def preference_options(command: Command) -> Command:
    """Adds the four lists as arguments by their names in RoutingPreferences (None: not given), and `clear`."""
    command = click.option("--clear", is_flag=True, help="Forget what was said before.")(command)
    for name, (option, text) in reversed(_OPTIONS.items()):
        command = click.option(option, name, type=NamesType(name), metavar="NAMES", help=text)(command)
    return command


def given(lists: dict[str, tuple[str, ...] | None], clear: bool) -> Lists:
    """The lists that were on the command line. Raises click.UsageError when nothing was."""
    said = {name: names for name, names in lists.items() if names is not None}
    if not said and not clear:
        raise click.UsageError("Say what to change: --allow, --exclude, --prefer, --tag or --clear.")
    return said


def document(preferences: RoutingPreferences | None) -> dict[str, Any] | None:
    """Preferences for JSON, with every list."""
    if preferences is None:
        return None
    return {name: getattr(preferences, name) for name in _OPTIONS}


def pairs(preferences: RoutingPreferences | None) -> list[tuple[str, object]]:
    """Preferences as facts: a line for each list that says something."""
    if preferences is None:
        return [("providers", "any, in the order of their routes")]
    said = ((name, getattr(preferences, name)) for name in _OPTIONS)
    return [(name, ", ".join(names) or "none") for name, names in said if names is not None and names != ()]


def brief(preferences: RoutingPreferences | None) -> str | None:
    """Preferences in one cell of a table; None for none."""
    return "; ".join(f"{name} {names}" for name, names in pairs(preferences)) if preferences is not None else None


def warn(unknown: list[str]) -> None:
    """Say on stderr what the configuration does not have."""
    for name in unknown:
        note(f"warning: the configuration has no {name}; this becomes effective once it has.")


def unknown(settings: Settings, preferences: RoutingPreferences | None) -> list[str]:
    """What of these preferences the configuration in force does not have: `provider x`, `model x/y`, `tag z`."""
    from config.settings import OPENAI, OPENAI_KEY_ENV, with_openai

    if preferences is None:
        return []
    providers = with_openai(settings, os.environ).providers
    listed = (OPENAI,) if os.environ.get(OPENAI_KEY_ENV) else ()  # it offers models that no route names
    candidates = {f"{one.provider}/{one.model}" for route in settings.routes.values() for one in route.candidates}
    missing = []
    for name in (*(preferences.allowed or ()), *preferences.excluded, *preferences.preferred):
        provider, slash, _ = name.partition("/")
        if provider not in providers:
            missing.append(f"provider {provider}")
        elif slash and name not in candidates and provider not in listed:
            missing.append(f"model {name}")
    tags = {tag for provider in providers.values() for tag in provider.tags}
    return list(dict.fromkeys((*missing, *(f"tag {tag}" for tag in preferences.tags if tag not in tags))))
