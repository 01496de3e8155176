#!lua
-- progress: a checkpoint. Stores the absolute metered cost, renews the lease, extends the hold towards `want`.
-- Applied when `q` rises and `metered` does not fall. A repeat (same q, same metered) renews the lease again, since its
-- sender is alive; anything older answers STALE and changes nothing. A short extension is a success: read `held`.
-- An extension takes grants first, then the account's credit line.
-- USES: burn holds line
-- KEYS: meta account order grants session leases
-- ARGV: ep uid sid fence q metered want lease
-- RETURN: OK|STALE held available | FINAL charged | FENCED | UNKNOWN | EPOCH | BOUNDS what
local meta, account, order, grants, session, leases = unpack(KEYS)
local ep, uid, sid, fence, q, metered, want, lease = unpack(ARGV)
if #KEYS ~= 6 or #ARGV ~= 8 then return { 'BOUNDS', 'arity' } end

if sub(session, 10) ~= sid then return { 'BOUNDS', 'id' } end
local q_n, metered_n, want_n, lease_n = amount(q), amount(metered), amount(want), amount(lease)
if not (q_n and metered_n and want_n) then return { 'BOUNDS', 'amount' } end
if not lease_n or lease_n == 0 or lease_n > 86400000 then return { 'BOUNDS', 'lease' } end

local now, _, saved = enter(meta, ep)
if not now then return { 'EPOCH' } end
local row = call('HMGET', session, 'st', 'f', 'u', 'h', 'm', 'q', 'sl', 'c')
if not row[1] or row[1] == 'V' or row[3] ~= uid then return { 'UNKNOWN' } end
if row[2] ~= fence then return { 'FENCED' } end
if row[1] == 'T' then return { 'FINAL', row[8] } end
local has, before_m, before_q = stored(row[4]), stored(row[5]), stored(row[6])
local money = call('HMGET', account, 'av', 'hd', 'blk')
local available, held = stored(money[1]), stored(money[2])

local rises = q_n > before_q and metered_n >= before_m
local repeats = q_n == before_q and metered_n == before_m
if not rises and not repeats then return { 'STALE', has, available } end

-- A blocked account keeps what it holds and gets no more.
local need = want_n > has and (not money[3] or money[3] == '0') and want_n - has or 0
local plan, taken = plan_take(order, grants, need, now)
local line, room, on_line, own = 0, 0, 0, 0
if taken < need then
  room, on_line = line_room(account, available, held)
  line = math.min(room, need - taken)
  if line > 0 then own = stored(call('HGET', session, 'hl')) end
end

local list = row[7] or ''
if taken > 0 then -- what the hold had, and what it takes now
  local slices, place = {}, {}
  local from = 1
  while from <= #list do
    local at, to = find(list, '=', from, true), find(list, ',', from, true) or #list + 1
    local slice = { gid = sub(list, from, at - 1), take = stored(sub(list, at + 1, to - 1)) }
    slices[#slices + 1], place[slice.gid], from = slice, slice, to + 1
  end
  for i = 1, #plan do
    local slice = place[plan[i].gid]
    if slice then slice.take = slice.take + plan[i].take else slices[#slices + 1] = plan[i] end
  end
  list = write_slices(slices)
end
if not may('HSET', session) then error({ err = BARRED }) end

-- Writes: only the first can fail.
call('ZADD', leases, now + lease_n, uid .. '|' .. sid)
if now > saved then call('HSET', meta, 'clk', now) end
if taken + line > 0 then
  has, available = has + taken + line, available - taken
  hold(grants, plan)
  call('HSET', session, 'm', metered_n, 'q', q_n, 'h', has, 'sl', list)
  call('HSET', account, 'av', available, 'hd', held + taken + line)
  if line > 0 then
    call('HSET', session, 'hl', own + line)
    call('HSET', account, 'hc', on_line + line)
  end
else
  call('HSET', session, 'm', metered_n, 'q', q_n)
end
return { 'OK', has, available }
