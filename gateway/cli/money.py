"""Credits as people write them, exactly: decimal text to integer micros and back. Must not: use a float anywhere."""

from __future__ import annotations

import re
from decimal import Decimal

import click

MICROS = 1_000_000
MICROS_MAX = 2**53 - 1
"""Largest amount that the ledger counts exactly (metering.ledger.MICROS_MAX)."""

_FORM = re.compile(r"[0-9]{1,16}(?:\.[0-9]{1,6})?", re.ASCII)
_SIGNED = re.compile(r"-[0-9.]+", re.ASCII)
_FINE = re.compile(r"[0-9]+\.[0-9]{7,}", re.ASCII)


class InvalidCredits(ValueError):
    """Not an amount of credits; the message says what is wrong with it."""


def parse_credits(text: str) -> int:
    """`"12.5"` -> 12_500_000 micros, more than 0. Raises InvalidCredits."""
    if _SIGNED.fullmatch(text):
        raise InvalidCredits("an amount must be more than 0")
    if _FINE.fullmatch(text):
        raise InvalidCredits("an amount has at most six decimals")
    if _FORM.fullmatch(text) is None:
        raise InvalidCredits("write an amount of credits as digits with at most six decimals, such as 12.50")
    micros = int(Decimal(text) * MICROS)  # at most 22 digits: exact within Decimal's 28
    if micros == 0:
        raise InvalidCredits("an amount must be more than 0")
    if micros > MICROS_MAX:
        raise InvalidCredits(f"an amount is at most {format_credits(MICROS_MAX)}")
    return micros


def parse_change(text: str) -> int:
    """`"-5"` -> -5_000_000 micros, `"5"` or `"+5"` -> 5_000_000; never 0. Raises InvalidCredits."""
    sign, amount = (text[0], text[1:]) if text[:1] in ("-", "+") else ("+", text)
    if amount[:1] in ("-", "+"):
        raise InvalidCredits("write one sign at most, such as -12.50")
    micros = parse_credits(amount)
    return -micros if sign == "-" else micros


def format_credits(micros: int) -> str:
    """Micros as decimal credits with two to six decimals: 12_500_000 -> `12.50`, 15 -> `0.000015`."""
    sign, whole = ("-" if micros < 0 else ""), abs(micros)
    decimals = f"{whole % MICROS:06d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole // MICROS}.{decimals}"


class CreditsType(click.ParamType[int]):
    """An amount of credits on the command line, as micros; `signed` ones may be less than 0."""

    name = "credits"

    def __init__(self, *, signed: bool = False) -> None:
        self._parse = parse_change if signed else parse_credits

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Text to micros; micros pass."""
        if isinstance(value, int):
            return value
        try:
            return self._parse(str(value))
        except InvalidCredits as error:
            self.fail(f"{error}.", param, ctx)
