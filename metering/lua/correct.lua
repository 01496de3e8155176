#!lua
-- correct: a swept session was charged what it had last metered; its owner, alive after all, says what is really due.
-- Upward only, once, by the owner's own fence, at most one hour after the sweep. The difference is paid by available
-- grants, then by the credit line, as debt; what nobody covers is absorbed by the house. A repeat answers EXISTS, a
-- session that its owner ended itself FINAL.
-- KEYS: meta account order grants session leases limits outbox
-- ARGV: ep uid sid kid fence charge metadata
-- RETURN: CORRECTED|EXISTS charged absorbed available n | LATE | LOWER | OPEN | FINAL | FENCED | UNKNOWN | EPOCH | BOUNDS what
local meta, account, order, grants, session, leases, limits, outbox = unpack(KEYS)
local ep, uid, sid, kid, fence, charge, metadata = unpack(ARGV)
if #KEYS ~= 8 or #ARGV ~= 7 then return { 'BOUNDS', 'arity' } end

if sub(session, 10) ~= sid then return { 'BOUNDS', 'id' } end
local charge_n = amount(charge)
if not charge_n then return { 'BOUNDS', 'amount' } end
if #metadata > 4096 then return { 'BOUNDS', 'metadata' } end

local now, n = enter(meta, ep)
if not now then return { 'EPOCH' } end
local row = call('HMGET', session, 'st', 'f', 'u', 'k', 'o', 'c', 'ab', 'te', 'cr', 'cc', 'ca')
if not row[1] or row[1] == 'V' then return { 'UNKNOWN' } end
if row[3] ~= uid or row[4] ~= kid then return { 'BOUNDS', 'session' } end
if row[2] ~= fence then return { 'FENCED' } end
if row[1] ~= 'T' then return { 'OPEN' } end
if row[5] ~= 'swept' then return { 'FINAL' } end
local money = call('HMGET', account, 'av', 'hd', 'db', 'tc')
local available, held, debt = stored(money[1]), stored(money[2]), stored(money[3])
if row[9] then
  return { 'EXISTS', text(stored(row[10])), text(stored(row[11])), text(available), text(stored(row[9])) }
end
local charged, absorbed = stored(row[6]), stored(row[7])
if charge_n <= charged + absorbed then return { 'LOWER' } end
if now - stored(row[8]) > 3600000 then return { 'LATE' } end

-- HERE: burn line excess parts grants
local due, slices = charge_n - charged - absorbed, {}
local found = spend_available(slices, due, now)
local left_over, owing = due - found, 0
if left_over > 0 then
  owing = math.min(left_over, (line_room(account, available, held)))
  left_over = left_over - owing
end
local dry = {}
for i = 1, #slices do dry[slices[i].gid] = slices[i].a == 0 and slices[i].h == 0 end
local members = listed(order, dry)
if not (may('HSET', meta) and may('HSET', session) and may('HSET', account) and may('HSET', grants)
  and may('ZREM', order)) then
  error({ err = BARRED })
end
local total = stored(money[4]) + (due - left_over)
local seq, paid, extra, left = text(n + 1), text(due - left_over), text(left_over), text(available - found)

-- Writes: only the first can fail.
call('XADD', outbox, format('%s-%s', ep, seq), 't', 'correct', 'u', uid, 'ts', now, 's', sid, 'k', kid,
  'c', paid, 'ab', extra, 'd', owing, 'sl', parts(slices, 'spent'), 'mt', metadata)
call('HSET', meta, 'n', seq, 'clk', now)
call('HSET', session, 'c', charged + due - left_over, 'ab', absorbed + left_over, 'cr', seq, 'cc', paid, 'ca', extra)
call('HSET', account, 'av', left, 'db', debt + owing, 'tc', total)
for i = 1, #slices do
  local s = slices[i]
  call('HSET', grants, s.a_name, s.a, s.c_name, s.c)
end
if #members > 0 then call('ZREM', order, unpack(members)) end
return { 'CORRECTED', paid, extra, left, seq }
