"""The mutants of who may write what: rights that are not asked for, keys that are not looked at. `mutants` says what
one is.

Must not: hold anything but mutants.
"""

from __future__ import annotations

from tests.support.mutants import Mutant, mutants_of

_HALF = "a user without the right leaves it half done"
_HOLD = "a_hold_is_refused_to_a_user_who_may_not_write_all_of_it"
_END = "a_session_ends_whole_or_not_at_all"
_CREDIT = "credit_comes_and_goes_whole_or_not_at_all"
_KEYS = "a_hold_is_made_only_under_keys_of_its_own"

# Each row: name, what it breaks, the scenario that kills it, the text, its replacement.
# fmt: off
RIGHTS: list[Mutant] = [
    *mutants_of(
        "reserve.lua",
        ("reserve_without_right_to_set_fields", _HALF, _HOLD, "not may('HSET', session) or ", ""),
        ("reserve_without_right_to_set", _HALF, _HOLD, "(keyed and not may('SET', idempotency))", "false"),
        ("reserve_without_right_to_drop", _HALF, _HOLD, "(drop[1] and not may('HDEL', limits))", "false"),
        ("reserve_under_anothers_session", "one session's hold stands under another's id", _KEYS,
         "sub(session, 10) ~= sid or ", ""),
        ("reserve_under_anothers_account", "one account's call is held on another's", _KEYS,
         "sub(account, 10) ~= uid or ", ""),
        ("reserve_in_anothers_order", "an account's grants are looked for in another's order", _KEYS,
         "sub(order, 10) ~= uid or ", ""),
        ("reserve_from_anothers_grants", "one account's call is paid by another's grants", _KEYS,
         "sub(grants, 10) ~= uid\n  or ", ""),
        ("reserve_under_anothers_limits", "one key's call counts against another's limits", _KEYS,
         "\n  or sub(limits, 10) ~= kid", ""),
    ),
    *mutants_of(
        "progress.lua",
        ("progress_without_right", _HALF, _HOLD, "if not may('HSET', session) then", "if false then"),
    ),
    *mutants_of(
        "reassert.lua",
        ("reassert_without_right", _HALF, _HOLD, "if not (may('HSET', meta) and", "if false and not ("),
        ("reassert_under_anothers_account", "one account's hold stands on another's", _KEYS,
         "sub(account, 10) ~= uid or ", ""),
        ("reassert_under_anothers_session", "one session's hold stands under another's id", _KEYS,
         "sub(session, 10) ~= sid or ", ""),
        ("reassert_under_anothers_limits", "one key's slot is taken for another's call", _KEYS,
         "\n  or sub(limits, 10) ~= kid", ""),
    ),
    *mutants_of(
        "_finish.lua",
        ("end_without_right_to_set_fields", _HALF, _END, "may('HSET', account) and ", ""),
        ("end_without_right_to_delete", _HALF, _END, "may('DEL', session) and ", ""),
        ("end_without_right_to_expire", _HALF, _END, " and may('PEXPIRE', session)", ""),
        ("end_without_right_to_remove", _HALF, _END, "call('ZREM', leases, '')", "call('ZCARD', leases)"),
    ),
    *mutants_of(
        "void.lua",
        ("tombstone_without_right", _HALF, _END,
         "if not (may('HSET', session) and may('PEXPIRE', session)) then", "if false then"),
    ),
    *mutants_of(
        "correct.lua",
        ("correct_without_right_to_set_fields", _HALF, _END,
         "may('HSET', meta) and may('HSET', session) and may('HSET', account) and may('HSET', grants)", "true"),
        ("correct_without_right_to_remove", _HALF, _END, "and may('ZREM', order)", ""),
    ),
    *mutants_of(
        "grant.lua",
        ("grant_without_right_to_set_fields", _HALF, _CREDIT,
         "may('HSET', meta) and may('HSET', account) and may('HSET', grants)", "true"),
        ("grant_without_right_to_list", _HALF, _CREDIT,
         "and may('ZADD', order)\n  and may('ZADD', expiries)", ""),
    ),
    *mutants_of(
        "expire.lua",
        ("expire_without_right_to_set_fields", _HALF, _CREDIT,
         "may('HSET', meta) and may('HSET', account) and may('HSET', grants)", "true"),
        ("expire_without_right_to_remove", _HALF, _CREDIT, "may('ZREM', order)\n  and may('ZREM', expiries)", "true"),
    ),
    *mutants_of(
        "revoke.lua",
        ("revoke_without_right_to_set_fields", _HALF, _CREDIT,
         "may('HSET', meta) and may('HSET', account) and may('HSET', grants)", "true"),
        ("revoke_without_right_to_remove", _HALF, _CREDIT,
         "and may('ZREM', order)\n  and may('ZREM', expiries)", ""),
    ),
    *mutants_of(
        "take.lua",
        ("take_without_right_to_set_fields", _HALF, _CREDIT,
         "may('HSET', meta) and may('HSET', account) and may('HSET', grants)", "true"),
        ("take_without_right_to_remove", _HALF, _CREDIT, " and may('ZREM', order)", ""),
    ),
    *mutants_of(
        "policy.lua",
        ("policy_without_right", _HALF, _CREDIT, "if not (may('HSET', meta) and may('HSET', account)) then",
         "if false then"),
        ("policy_conflict_by_limit_unseen", "another limit under a known revision is confirmed",
         "a_policy_is_set_once_per_revision", " or stored(row[6]) ~= limit_n", ""),
        ("policy_conflict_by_name_unseen", "another policy under a known revision is confirmed",
         "a_policy_is_set_once_per_revision", "row[5] ~= policy or ", ""),
    ),
]
# fmt: on
