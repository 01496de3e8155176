#!lua
-- reserve: admits a session and holds up to `want` micros for it, at least `minimum`, all or nothing.
-- In this order: the session's own past, the client's idempotency key, the account (blocked, debt), the key's limits,
-- the credit.
-- A refusal stores nothing, so the same session may try again after a top-up. Idempotent by session id.
-- `rpm` and `parallel` are the key's limits, '' for none; they are counted only when the session is admitted.
-- `idempotency` names the session that has the client's idempotency key, and its body, for a day; a bare prefix is none.
-- `past` is a session that the caller knows to be void: it may be replaced there. '' for none.
-- A hold takes grants first, then the account's credit line; debt refuses where the line has no room.
-- USES: words burn holds line
-- KEYS: meta account order grants session leases limits idempotency
-- ARGV: ep uid sid kid owner body price metadata want minimum prompt lease rpm parallel past
-- RETURN: HELD|EXISTS held available fence lease_ms | BALANCE|IN_FLIGHT|REQUESTS|PARALLEL|DEBT|BLOCKED|CONFLICT|TOMBSTONE|FINISHED available held retry_after_ms | REPEATED session same_or_other | EPOCH | BOUNDS what
local meta, account, order, grants, session, leases, limits, idempotency = unpack(KEYS)
local ep, uid, sid, kid, owner, body, price, metadata, want, minimum, prompt, lease, rpm, parallel, past = unpack(ARGV)
if #KEYS ~= 8 or #ARGV ~= 15 then return { 'BOUNDS', 'arity' } end

if not (id(uid) and id(sid) and id(kid) and (past == '' or id(past))) then return { 'BOUNDS', 'id' } end
if sub(session, 10) ~= sid or sub(account, 10) ~= uid or sub(order, 10) ~= uid or sub(grants, 10) ~= uid
  or sub(limits, 10) ~= kid then
  return { 'BOUNDS', 'keys' }
end
if not (word(owner) and word(body) and word(price)) then return { 'BOUNDS', 'word' } end
if #metadata > 4096 then return { 'BOUNDS', 'metadata' } end
local want_n, minimum_n, prompt_n, lease_n = amount(want), amount(minimum), amount(prompt), amount(lease)
if not (want_n and minimum_n and prompt_n) or want_n < minimum_n then return { 'BOUNDS', 'amount' } end
if not lease_n or lease_n == 0 or lease_n > 86400000 then return { 'BOUNDS', 'lease' } end
local rpm_n, parallel_n = rpm ~= '' and amount(rpm), parallel ~= '' and amount(parallel)
if rpm_n == nil or parallel_n == nil then return { 'BOUNDS', 'limits' } end

local now, _, saved = enter(meta, ep)
if not now then return { 'EPOCH' } end
local row = call('HMGET', account, 'av', 'hd', 'db', 'ns', 'blk')
local available, held, debt, open = stored(row[1]), stored(row[2]), stored(row[3]), stored(row[4])

local function refuse(code, spendable, retry)
  return { code, text(spendable), text(held), text(retry) }
end

-- The session's own past.
local state = call('HGET', session, 'st')
if state == 'V' then return refuse('TOMBSTONE', available, 0) end
if state == 'T' then return refuse('FINISHED', available, 0) end
if state then
  local own = call('HMGET', session, 'bh', 'u', 'k', 'ow', 'h', 'f')
  if own[1] ~= body or own[2] ~= uid or own[3] ~= kid or own[4] ~= owner then
    return refuse('CONFLICT', available, 0)
  end
  local deadline = (call('ZSCORE', leases, uid .. '|' .. sid) or 0) + 0
  return { 'EXISTS', own[5], available, own[6], math.max(0, deadline - now) }
end

-- The client's idempotency key, behind the prefix 'i:{v000}:'.
local keyed = sub(idempotency, 10) ~= ''
local record = keyed and call('GET', idempotency)
if record then
  local by, hash = string.match(record, '^(%S+) (%S*)$')
  if not by then error({ err = 'BROKEN an idempotency key names no session' }) end
  if hash ~= body then return { 'REPEATED', by, 'other' } end
  if by ~= past then return { 'REPEATED', by, 'same' } end
end

-- The account.
if row[5] and row[5] ~= '0' then return refuse('BLOCKED', available, 0) end
local room, on_line = nil, nil
if debt > 0 then
  room, on_line = line_room(account, available, held)
  if room == 0 then return refuse('DEBT', available, 0) end
end

-- The key: `p` open sessions; `q` admissions ever under a rate; `w<j>` the time of admission j; `lo` the oldest kept.
-- A missing w<j> was older than a minute when it was dropped, so changing the limit keeps the window exact.
local used = rpm_n and call('HMGET', limits, 'p', 'q', 'lo') or { call('HGET', limits, 'p') }
local slots, admitted, oldest = stored(used[1]), stored(used[2]), stored(used[3])
if rpm_n then
  if rpm_n == 0 then return refuse('REQUESTS', available, 0) end
  local at = admitted >= rpm_n and call('HGET', limits, format('w%.0f', admitted - rpm_n))
  local frees = at and stored(at) + 60000 or 0
  if frees > now then return refuse('REQUESTS', available, frees - now) end
end
if parallel_n and slots >= parallel_n then return refuse('PARALLEL', available, 1000) end

-- The credit. A plan that falls short has seen every grant, so with the line's part it is all that could be spent.
local plan, taken = plan_take(order, grants, want_n, now)
local line = 0
if taken < want_n then
  if not room then room, on_line = line_room(account, available, held) end
  line = math.min(room, want_n - taken)
end
local whole = taken + line
if whole < minimum_n then
  if whole + held < minimum_n then return refuse('BALANCE', whole, 0) end
  return refuse('IN_FLIGHT', whole, 1000)
end
-- Times of admissions that no window can ask for any more; some at a time.
local drop = {}
while rpm_n and oldest <= admitted - rpm_n and #drop < 16 do
  drop[#drop + 1] = format('w%.0f', oldest)
  oldest = oldest + 1
end
if not may('HSET', session) or (keyed and not may('SET', idempotency)) or (drop[1] and not may('HDEL', limits)) then
  error({ err = BARRED })
end

-- Writes: only the first can fail.
local left = available - taken
call('ZADD', leases, now + lease_n, uid .. '|' .. sid)
if now > saved then call('HSET', meta, 'clk', now) end
call('HSET', session, 'st', 'H', 'f', now, 'u', uid, 'k', kid, 'h', whole, 'm', '0', 'q', '0', 'pc', prompt_n,
  'ow', owner, 'bh', body, 'pv', price, 'mt', metadata, 'ts', now, 'sl', write_slices(plan))
if keyed then call('SET', idempotency, format('%s %s', sid, body), 'PX', '86400000') end
call('HSET', account, 'av', left, 'hd', held + whole, 'ns', open + 1)
if line > 0 then
  call('HSET', session, 'hl', line)
  call('HSET', account, 'hc', on_line + line)
end
hold(grants, plan)
if not rpm_n then
  call('HSET', limits, 'p', slots + 1)
else
  if drop[1] then call('HDEL', limits, unpack(drop)) end
  call('HSET', limits, 'p', slots + 1, 'q', admitted + 1, 'lo', oldest, format('w%.0f', admitted), now)
end
return { 'HELD', whole, left, now, lease_n }
