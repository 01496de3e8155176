"""docs/failover.md shows the very table that decides, and the table of faults that the acceptance tests hold true."""

from __future__ import annotations

import re
from pathlib import Path

from gateway.errors import TABLE
from providers.retry import FAULTS, RULES, Behaviour, Mark, Point
from proxy.errors import ContextLengthExceeded, ProviderBusy, ProviderNotAllowed, ProviderUnavailable
from tests.support.fault_table import BOTH, BROKEN, DELIVERED, PROMPT, ROWS, Row

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "failover.md").read_text()

BEHAVIOURS = {
    Behaviour.RETRY: "again, then next",
    Behaviour.ELSEWHERE: "next, or again",
    Behaviour.NEXT: "next",
    Behaviour.IF_CONFIGURED: "next, if asked for",
    Behaviour.CONTINUE: "continued, if asked for",
    Behaviour.GIVE_UP: "told",
}
MARKS = {
    Mark.HEALTHY: "it is healthy",
    Mark.FAILURE: "a failure",
    Mark.KEY_REFUSED: "the key is refused",
    Mark.MISSING: "the model is missing",
    Mark.NOTHING: "nothing",
    Mark.PAUSE: "a pause, if one is asked for",
}
POINTS = {"headers": "before headers", "content": "before content", "after": "after content"}
THEN = {"next": "answers", "retry, next": "answers, after a retry", "none": "is not asked"}
LEFT = {"": "", "counted": "counted", "paused": "paused", "key": "key refused", "missing": "model missing"}


def rule_lines() -> list[str]:
    """The rules as the page has them."""
    lines = []
    for fault, meaning in FAULTS.items():
        rules = [RULES[fault, point] for point in Point]
        (mark,) = {rule.mark for rule in rules}
        cells = [f"`{fault}`", meaning, *(BEHAVIOURS[rule.behaviour] for rule in rules), MARKS[mark]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def fault_line(row: Row) -> str:
    """A row of the acceptance table as the page has it."""
    status, code = row.told
    told = f"{status} `{code}`" if code else str(status)
    if row.ending == "completed":
        told = "the answer"
    elif row.point == "after":
        told = f"in the stream: {f'`{code}`' if code else 'the error'}"
    form = "both" if row.forms == BOTH else row.forms[0]
    where = [row.fault, POINTS[row.point], form, f"`{row.outcome}`"]
    cells = [*where, THEN[row.then], told, str(row.tries), str(row.charge), row.ending, LEFT[row.left]]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def table_under(header: str) -> list[str]:
    """The rows of the table that begins with this header."""
    found = re.search(rf"^{re.escape(header)}.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert found, header
    return found[1].splitlines()


def test_the_page_has_the_rules_that_decide() -> None:
    assert table_under("| fault | what it is |") == rule_lines()


def test_the_page_has_the_faults_that_were_tried() -> None:
    assert table_under("| fault | when | form |") == [fault_line(row) for row in ROWS]


def test_every_rule_before_and_after_content_is_tried_but_those_of_attempts_that_are_not_sent() -> None:
    tried = {(row.outcome, Point(list(POINTS).index(row.point))) for row in ROWS if row.ending != "completed"}
    assert {fault for fault, _ in tried} == set(FAULTS) - {"unsupported", "busy", "breaker_open"}


def test_the_page_says_what_the_table_is_reckoned_with() -> None:
    assert f"a prompt of {PROMPT} tokens" in PAGE
    assert f"({PROMPT} + {DELIVERED} = {BROKEN})" in PAGE


def test_the_page_names_what_clients_are_told() -> None:
    for error in (ProviderUnavailable, ProviderBusy, ProviderNotAllowed, ContextLengthExceeded):
        shown = TABLE[error]
        assert f"| {shown.status} `{shown.code}` |" in PAGE
