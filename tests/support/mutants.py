"""Hand-made mutants of the ledger's scripts: small changes of the kind that a tired hand makes, each with its damage.

`find` must occur exactly once in its file: the run fails when it does not, so that whoever changes a script keeps the
list. `killer` names the scenario that is tried first; the run verifies it each time and tries all others when it does
not kill. Must not: hold a mutant that changes nothing that can be observed, or one that is no valid Lua.
"""

from __future__ import annotations

from dataclasses import dataclass

from metering.scripts import FOLDER, Script, load
from tests.support.valkey import TEST_CLOCK


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one script file. `breaks` says in words what a user or the books would lose."""

    name: str
    file: str
    breaks: str
    killer: str
    find: str
    replacement: str = ""


def occurrences(mutant: Mutant) -> int:
    """How often the mutant's text stands in its file; anything but 1 means that the list must be kept."""
    return (FOLDER / mutant.file).read_text(encoding="utf-8").count(mutant.find)


def mutate(loaded: dict[str, Script], mutant: Mutant) -> dict[str, Script]:
    """The scripts of the test clock, `loaded`, with the mutant's text wherever its file is part of one. Raises
    AssertionError when that changes none."""
    old = (FOLDER / mutant.file).read_text(encoding="utf-8")
    changed = load(TEST_CLOCK, {mutant.file: old.replace(mutant.find, mutant.replacement)})
    out = {name: loaded[name] if script == loaded[name] else script for name, script in changed.items()}
    assert out != loaded, f"mutant {mutant.name} changes no script"
    return out


def mutants_of(file: str, *rows: tuple[str, str, str, str, str]) -> list[Mutant]:
    """Mutants of one file; each row is name, breaks, killer, find, replacement."""
    return [Mutant(name, file, breaks, killer, find, new) for name, breaks, killer, find, new in rows]


# Each row: name, what it breaks, the scenario that kills it, the text, its replacement.
# fmt: off
PRELUDE = [*mutants_of(
    "_prelude.lua",
    ("clock_follows_the_server_back", "expired grants come back to life after a failover",
     "the_clock_never_goes_back",
     "if saved > now then now = saved end", ""),
    ("epoch_not_checked", "a gateway of before a rebuild goes on writing",
     "another_epoch_is_refused",
     "if row[1] ~= ep then return nil end", ""),
    ("numbers_leave_as_1e14", "amounts of 15 digits are stored as 1e+14",
     "amounts_of_15_digits_stay_whole",
     "and '0' or format('%.0f', n) end", "and '0' or tostring(n) end"),
    ("amounts_over_2_53_accepted", "sums that a double cannot count",
     "absurd_amounts_are_refused",
     "if n > MAX then return nil end", ""),
    ("amounts_only_begin_with_a_digit", "1e3 passes for an amount",
     "absurd_amounts_are_refused",
     "not find(s, '^%d+$')", "not find(s, '^%d') or not tonumber(s)"),
    ("damage_counts_as_zero", "a damaged figure silently becomes 0 credit",
     "damage_stops_a_call_before_its_first_write",
     "  error({ err = 'BROKEN a stored number is not an amount' })\n", "  return 0\n"),
), *mutants_of(
    "_words.lua",
    ("ids_with_separators", "an id with | or = forges members and slices",
     "ids_with_separators_are_refused",
     " and find(s, '^[%w_-]+$')", " and #s > 0"),
), *mutants_of(
    "_burn.lua",
    ("spendable_at_its_expiry", "a grant can be held in the millisecond in which it expires",
     "a_grant_is_spendable_until_its_millisecond",
     "sub(members[i], 4, 18) + 0 > now", "sub(members[i], 4, 18) + 0 >= now"),
    ("plan_skips_a_page", "grants in the skipped page cannot be spent",
     "every_page_of_the_burn_order_is_read",
     "first, size = first + size, size * 4", "first, size = first + size * 2, size * 4"),
    ("plan_reads_one_page", "only the first grant is ever spendable",
     "every_page_of_the_burn_order_is_read",
     "if #members < size then break end", "do break end"),
    ("plan_reads_a_page_twice", "a grant is held twice over",
     "every_page_of_the_burn_order_is_read",
     "first, size = first + size, size * 4", "first, size = first + size - 1, size * 4"),
    ("plan_takes_whole_grants", "a hold takes more than it asked for",
     "a_hold_moves_credit_and_opens_a_session",
     "local take = math.min(a, need - got)", "local take = a"),
), *mutants_of(
    "_holds.lua",
    ("hold_forgets_other_holds", "the second session's hold on a grant erases the first",
     "sessions_share_a_grant",
     "p.h_name, p.h + p.take", "p.h_name, p.take"),
    ("hold_keeps_it_available", "held credit can be held again",
     "a_hold_moves_credit_and_opens_a_session",
     "p.a_name, p.a - p.take", "p.a_name, p.a"),
    ("slices_written_backwards", "the grant that expires last pays first",
     "slices_pay_in_the_order_in_which_they_were_taken",
     "parts[i] = format('%s=%.0f'", "parts[#slices + 1 - i] = format('%s=%.0f'"),
)]

RESERVE = mutants_of(
    "reserve.lua",
    ("tombstone_ignored", "a delayed reserve holds credit for a call that was given up",
     "a_delayed_reserve_finds_the_tombstone",
     "if state == 'V' then return refuse('TOMBSTONE', available, 0) end", "if state == 'V' then state = nil end"),
    ("finished_sessions_begin_again", "a settled session holds and charges a second time",
     "a_finished_session_is_not_reserved_again",
     "if state == 'T' then return refuse('FINISHED', available, 0) end", "if state == 'T' then state = nil end"),
    ("body_not_compared", "another request gets the hold of this one",
     "a_session_of_somebody_else_is_a_conflict",
     "own[1] ~= body or ", ""),
    ("key_not_compared", "another key's session counts as its own",
     "a_session_of_somebody_else_is_a_conflict",
     " or own[3] ~= kid", ""),
    ("owner_not_compared", "two gateways run one session",
     "a_session_of_somebody_else_is_a_conflict",
     " or own[4] ~= owner", ""),
    ("repeat_answers_what_was_asked", "a retried short hold is believed to be long",
     "a_repeated_reserve_answers_what_is_held",
     "return { 'EXISTS', own[5],", "return { 'EXISTS', want,"),
    ("repeat_answers_a_whole_lease", "the owner writes on after its lease was swept",
     "a_repeated_reserve_answers_what_is_held",
     "math.max(0, deadline - now)", "lease"),
    ("repeat_is_not_known", "a retried reserve holds twice",
     "a_repeated_reserve_answers_what_is_held",
     "\nif state then\n", "\nif false then\n"),
    ("blocked_accounts_pass", "a blocked account spends on",
     "a_blocked_account_begins_and_extends_nothing",
     "row[5] ~= '0' then", "row[5] == '0' then"),
    ("minimum_ignored", "a call starts that its credit cannot cover",
     "a_short_hold_is_taken_down_to_the_minimum_and_not_below",
     "want_n < minimum_n then return { 'BOUNDS', 'amount' } end",
     "want_n < minimum_n then return { 'BOUNDS', 'amount' } end minimum_n = 0"),
    ("minimum_over_want_accepted", "a hold above what was asked for",
     "absurd_amounts_are_refused",
     " or want_n < minimum_n then return", " then return"),
    ("lease_of_zero_accepted", "a session is swept in the moment it begins",
     "absurd_amounts_are_refused",
     "or lease_n == 0 ", ""),
    ("rate_window_off_by_one", "one request more than the limit per minute",
     "requests_slide_over_a_minute",
     "call('HGET', limits, format('w%.0f', admitted - rpm_n))",
     "call('HGET', limits, format('w%.0f', admitted - rpm_n - 1))"),
    ("rate_window_of_6_seconds", "ten times the limit",
     "requests_slide_over_a_minute",
     "stored(at) + 60000", "stored(at) + 6000"),
    ("retry_after_is_a_time", "clients wait for decades",
     "requests_slide_over_a_minute",
     "frees - now)", "frees)"),
    ("rate_of_zero_admits", "a key without requests makes them",
     "requests_slide_over_a_minute",
     "if rpm_n == 0 then", "if rpm_n == 1 then"),
    ("admissions_not_counted", "the rate limit never refuses",
     "requests_slide_over_a_minute",
     "'q', admitted + 1", "'q', admitted"),
    ("young_admissions_dropped", "requests of the last minute are forgotten",
     "old_admissions_are_forgotten_and_young_ones_kept",
     "oldest <= admitted - rpm_n and", "oldest <= admitted - 1 and"),
    ("old_admissions_kept", "a key's hash grows for ever",
     "old_admissions_are_forgotten_and_young_ones_kept",
     "  if drop[1] then", "  if drop[17] then"),
    ("one_slot_too_many", "one parallel session more than the limit",
     "parallel_sessions_are_counted_until_they_end",
     "slots >= parallel_n", "slots > parallel_n"),
    ("slots_not_counted", "the parallel limit never refuses",
     "parallel_sessions_are_counted_until_they_end",
     "  call('HSET', limits, 'p', slots + 1)\nelse", "\nelse"),
    ("slots_not_counted_with_a_rate", "the parallel limit never refuses a key that has a rate",
     "parallel_sessions_are_counted_until_they_end",
     "'p', slots + 1, 'q'", "'p', slots, 'q'"),
    ("clock_not_saved_by_reserve", "time goes back after a failover",
     "the_clock_never_goes_back",
     "if now > saved then call('HSET', meta, 'clk', now) end", ""),
    ("lease_not_written", "a dead gateway's hold is never freed",
     "a_hold_moves_credit_and_opens_a_session",
     "call('ZADD', leases, now + lease_n, uid .. '|' .. sid)", ""),
    ("open_sessions_not_counted", "a settlement finds no open session and refuses",
     "a_hold_moves_credit_and_opens_a_session",
     "'ns', open + 1", "'ns', open"),
    ("grants_not_touched", "the account says held, its grants do not",
     "a_hold_moves_credit_and_opens_a_session",
     "\nhold(grants, plan)\n", "\n"),
    ("fence_is_constant", "a fence protects nobody",
     "a_hold_moves_credit_and_opens_a_session",
     "'f', now", "'f', '1'"),
    ("idempotency_record_not_set", "a retry with the same key runs and pays twice",
     "one_session_has_the_idempotency_key",
     "if keyed then call('SET', idempotency", "if false then call('SET', idempotency"),
    ("idempotency_record_for_ever", "Redis fills with old keys",
     "one_session_has_the_idempotency_key",
     ", 'PX', '86400000')", ")"),
    ("idempotency_body_not_compared", "another body gets the answer of this one",
     "one_session_has_the_idempotency_key",
     "if hash ~= body then", "if false then"),
    ("idempotency_record_ignored", "a retry with the same key runs and pays twice",
     "one_session_has_the_idempotency_key",
     "if by ~= past then", "if false then"),
    ("idempotency_never_replaced", "a voided call's key is lost for a day",
     "one_session_has_the_idempotency_key",
     "if by ~= past then", "if true then"),
)

PROGRESS = mutants_of(
    "progress.lua",
    ("progress_without_fence", "a stranger extends and renews the session",
     "progress_needs_the_session_its_account_and_its_fence",
     "if row[2] ~= fence then return { 'FENCED' } end", ""),
    ("progress_without_account", "one account's call takes credit for another's session",
     "progress_needs_the_session_its_account_and_its_fence",
     " or row[3] ~= uid then", " then"),
    ("progress_after_the_end", "a settled session comes back as a lease",
     "progress_needs_the_session_its_account_and_its_fence",
     "if row[1] == 'T' then return { 'FINAL', row[8] } end", ""),
    ("sequence_not_monotone", "a delayed checkpoint overwrites a newer one",
     "an_older_or_falling_progress_is_stale",
     "q_n > before_q and metered_n >= before_m", "metered_n >= before_m"),
    ("metered_may_fall", "a sweep charges less than was metered",
     "an_older_or_falling_progress_is_stale",
     "q_n > before_q and metered_n >= before_m", "q_n > before_q"),
    ("repeats_are_stale", "a retried checkpoint does not renew the lease",
     "an_older_or_falling_progress_is_stale",
     "local repeats = q_n == before_q and metered_n == before_m", "local repeats = false"),
    ("repeats_with_another_cost", "one sequence number has two costs",
     "an_older_or_falling_progress_is_stale",
     "q_n == before_q and metered_n == before_m", "q_n == before_q and metered_n >= before_m"),
    ("blocked_accounts_extend", "a blocked account spends on in its running streams",
     "a_blocked_account_begins_and_extends_nothing",
     "money[3] == '0'", "money[3] ~= '0'"),
    ("extends_by_want", "each checkpoint holds another full amount",
     "progress_extends_to_want_and_renews_the_lease",
     "and want_n - has or 0", "and want_n or 0"),
    ("slice_replaced", "what was held before is forgotten at settlement",
     "progress_extends_to_want_and_renews_the_lease",
     "slice.take = slice.take + plan[i].take", "slice.take = plan[i].take"),
    ("lease_not_renewed", "a live stream is swept",
     "progress_extends_to_want_and_renews_the_lease",
     "call('ZADD', leases, now + lease_n, uid .. '|' .. sid)", ""),
    ("clock_not_saved_by_progress", "time goes back after a failover",
     "the_clock_never_goes_back",
     "if now > saved then call('HSET', meta, 'clk', now) end", ""),
)
# fmt: on
