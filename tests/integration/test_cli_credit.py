"""The command line's ways to change credit after it was given."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.support.cli import Run


def test_credit_is_adjusted_and_revoked_and_the_list_tells_what_became_of_it(
    document: Callable[..., Any], run: Run
) -> None:
    account = document("accounts", "create", "Changed")["id"]
    for gid, extra in (("one", ("--priority", "9")), ("two", ()), ("three", ("--notes", "trial"))):
        document("credits", "grant", account, "10", "--id", f"cli-{gid}", *extra)
    taken = document("credits", "adjust", account, "-2.5", "--id", "cli-fix", "--notes", "paid twice")
    assert (taken["state"], taken["amount"], taken["available"]) == ("applied", "-2.50", "27.50")
    assert document("credits", "adjust", account, "-2.5", "--id", "cli-fix") == taken, "the same id takes nothing twice"
    code, out, _ = run("credits", "adjust", account, "-100", "--json")
    refused = json.loads(out)
    assert (code, refused["state"], refused["amount_micros"]) == (1, "refused", 0)
    assert document("credits", "adjust", account, "+1", "--id", "cli-gift")["available"] == "28.50"
    for _ in range(2):
        revoked = document("grants", "revoke", "cli-two", "--notes", "returned")
        assert (revoked["state"], revoked["voided"], revoked["available_micros"]) == ("applied", "10.00", 18_500_000)
    listed = {one["id"]: one for one in document("grants", "list", "Changed")["grants"]}
    assert {gid: (one["state"], one["available"], one["voided"]) for gid, one in listed.items()} == {
        "cli-one": ("open", "7.50", "2.50"), "cli-two": ("revoked", "0.00", "10.00"),
        "cli-three": ("open", "10.00", "0.00"), "cli-gift": ("open", "1.00", "0.00"),
    }  # fmt: skip
    assert (listed["cli-one"]["priority"], listed["cli-three"]["notes"]) == (9, "trial")
    document("credits", "adjust", account, "-100", "--partly")
    assert {one["state"] for one in document("grants", "list", account)["grants"]} == {"spent", "revoked"}
    code, out, _ = run("grants", "list", account)
    assert code == 0
    assert "cli-gift" in out
    assert document("audit", "--account", account)["ok"] is True
