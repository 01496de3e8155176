#!lua
-- reassert: makes the hold of a session anew after its shard was rebuilt, under the fence that its owner has. Takes up
-- to `want` from the grants that could be spent when the session began, in burn order, then from the credit line. What
-- is left of them is a success, also nothing: the work was done, so neither debt nor a block refuses it. Its settlement
-- finds the rest, or the house absorbs it. A session that the shard knows stays as it is.
-- USES: words burn holds line
-- KEYS: meta account order grants session leases limits
-- ARGV: ep uid sid kid fence q metered want prompt owner body price metadata lease
-- RETURN: HELD|EXISTS held available | FINAL charged | TOMBSTONE | CONFLICT | EPOCH | BOUNDS what
local meta, account, order, grants, session, leases, limits = unpack(KEYS)
local ep, uid, sid, kid, fence, q, metered, want, prompt, owner, body, price, metadata, lease = unpack(ARGV)
if #KEYS ~= 7 or #ARGV ~= 14 then return { 'BOUNDS', 'arity' } end

if not (id(uid) and id(sid) and id(kid)) then return { 'BOUNDS', 'id' } end
if sub(session, 10) ~= sid or sub(account, 10) ~= uid or sub(order, 10) ~= uid or sub(grants, 10) ~= uid
  or sub(limits, 10) ~= kid then
  return { 'BOUNDS', 'keys' }
end
if not (word(owner) and word(body) and word(price)) then return { 'BOUNDS', 'word' } end
if #metadata > 4096 then return { 'BOUNDS', 'metadata' } end
local fence_n, q_n, lease_n = amount(fence), amount(q), amount(lease)
local metered_n, want_n, prompt_n = amount(metered), amount(want), amount(prompt)
if not (fence_n and q_n and metered_n and want_n and prompt_n) then return { 'BOUNDS', 'amount' } end
if not lease_n or lease_n == 0 or lease_n > 86400000 then return { 'BOUNDS', 'lease' } end

local now, _, saved = enter(meta, ep)
if not now then return { 'EPOCH' } end
local row = call('HMGET', account, 'av', 'hd', 'ns')
local available, held, open = stored(row[1]), stored(row[2]), stored(row[3])
local past = call('HMGET', session, 'st', 'u', 'h', 'c')
if past[1] == 'V' then return { 'TOMBSTONE' } end
if past[1] and past[2] ~= uid then return { 'CONFLICT' } end
if past[1] == 'T' then return { 'FINAL', past[4] } end
if past[1] then return { 'EXISTS', text(stored(past[3])), text(available) } end
local slots = stored(call('HGET', limits, 'p'))
local plan, taken = plan_take(order, grants, want_n, math.min(now, fence_n))
local line, on_line = 0, nil
if taken < want_n then
  line, on_line = line_room(account, available, held)
  line = math.min(line, want_n - taken)
end
local whole = taken + line

if not (may('HSET', meta) and may('HSET', session) and may('HSET', account) and may('HSET', grants)
  and may('HSET', limits)) then
  error({ err = BARRED })
end

-- Writes: only the first can fail.
call('ZADD', leases, now + lease_n, uid .. '|' .. sid)
if now > saved then call('HSET', meta, 'clk', text(now)) end
call('HSET', session, 'st', 'H', 'f', text(fence_n), 'u', uid, 'k', kid, 'h', text(whole), 'm', text(metered_n),
  'q', text(q_n), 'pc', text(prompt_n), 'ow', owner, 'bh', body, 'pv', price, 'mt', metadata, 'ts', text(fence_n),
  'sl', write_slices(plan))
call('HSET', account, 'av', text(available - taken), 'hd', text(held + whole), 'ns', text(open + 1))
if line > 0 then
  call('HSET', session, 'hl', text(line))
  call('HSET', account, 'hc', text(on_line + line))
end
hold(grants, plan)
call('HSET', limits, 'p', text(slots + 1))
return { 'HELD', text(whole), text(available - taken) }
