-- The end of settle, void and sweep: the one place where a session ends. It takes from above their KEYS, `row` (from
-- _session.lua), ep, uid, sid, kid, now, n and what they decided: charge, outcome, metadata.
-- It is no function, and what is rare stands in branches: a script is built anew in each call, and a function that is
-- made and not used costs as much as reading a field.
-- Everything is read and computed before the first write; the first write is the XADD, the only one that can refuse
-- for a reason that no check shows (a stream already ahead of n). It is therefore its own check.
if row[1] == 'T' then -- a repeat: what the first call said, and the balance now
  local v = call('HMGET', session, 'c', 'ab', 'n', 'o')
  return { 'FINAL', v[1], v[2], stored(call('HGET', account, 'av')), v[3], v[4] }
end
local money = call('HMGET', account, 'av', 'hd', 'db', 'tc', 'ns')
local before, held, debt, open = stored(money[1]), stored(money[2]), stored(money[3]), stored(money[5])
local has, slots = stored(row[5]), stored(call('HGET', limits, 'p'))
if held < has or open == 0 then error({ err = 'BROKEN an account holds less than its session' }) end

-- Held slices pay first, in their order. The unused rest of one is voided when its grant is revoked. Else it repays
-- debt first, then returns to its grant, or to breakage when that has expired.
local slices, owed, available, repaid, lost = {}, charge, before, 0, 0
local list, from = row[11] or '', 1
while from <= #list do
  local at, to = find(list, '=', from, true), find(list, ',', from, true) or #list + 1
  local gid, take = sub(list, from, at - 1), stored(sub(list, at + 1, to - 1))
  local a_name, h_name, c_name = gid .. ':a', gid .. ':h', gid .. ':c'
  local part = call('HMGET', grants, a_name, h_name, c_name, gid .. ':e', gid .. ':z')
  local a, h, c, expiry = stored(part[1]), stored(part[2]) - take, stored(part[3]), stored(part[4])
  if h < 0 then error({ err = 'BROKEN a grant holds less than its session' }) end
  local spent = math.min(take, owed)
  local back, repays, voided, broken, lost_name, lost_sum = take - spent, 0, 0, 0, nil, nil
  if back > 0 and part[5] then
    voided, back, lost_name = back, 0, gid .. ':v'
  elseif back > 0 then
    repays = math.min(back, debt - repaid)
    back = back - repays
    if back > 0 and expiry > 0 and expiry <= now then broken, back, lost_name = back, 0, gid .. ':x' end
  end
  if lost_name then
    lost_sum, lost = stored(call('HGET', grants, lost_name)) + voided + broken, lost + voided + broken
  end
  slices[#slices + 1] = { gid = gid, spent = spent, repaid = repays, voided = voided, broken = broken, a = a + back,
    h = h, c = c + spent + repays, a_name = a_name, h_name = h_name, c_name = c_name, lost_name = lost_name,
    lost = lost_sum }
  owed, repaid, available, from = owed - spent, repaid + repays, available + back, to + 1
end

-- What they do not cover: available grants, then the credit line, with what the hold has of it and its free room. What
-- is used of the line becomes debt, the rest of the hold's part is free again.
local line, owing, on_line = stored(row[12]), 0, 0
if owed > 0 then
  -- HERE: burn excess
  local found = spend_available(slices, owed, now)
  owed, available = owed - found, available - found
end
if line > 0 or owed > 0 then
  -- HERE: line
  local room
  room, on_line = line_room(account, before, held)
  if on_line < line then error({ err = 'BROKEN an account holds less of its line than its session' }) end
  owing = math.min(owed, line + room)
  owed = owed - owing
end

-- HERE: parts
local broken, rare, dry, members = '', {}, nil, nil
if lost + repaid > 0 then
  local back, voided = parts(slices, 'repaid'), parts(slices, 'voided')
  broken = parts(slices, 'broken')
  if back ~= '' then rare[1], rare[2] = 'rp', back end -- fields that most entries lack
  if voided ~= '' then rare[#rare + 1], rare[#rare + 2] = 'vd', voided end
end
for i = 1, #slices do
  if slices[i].a == 0 and slices[i].h == 0 then
    dry = dry or {}
    dry[slices[i].gid] = true
  end
end
if dry then
  -- HERE: grants
  members = listed(order, dry)
end
if metadata == '' then metadata = call('HGET', session, 'mt') or '' end
call('ZREM', leases, '') -- nobody's: what counts is the key's type and the user's right
if not (may('HSET', account) and may('DEL', session) and may('PEXPIRE', session)) then error({ err = BARRED }) end
local seq, paid = n + 1, charge - owed
local total = stored(money[4]) + paid

-- Writes: only the first can fail.
call('XADD', outbox, format('%s-%.0f', ep, seq), 't', 'settle', 'u', uid, 'ts', now, 's', sid, 'k', kid,
  'o', outcome, 'c', paid, 'ab', owed, 'd', owing, 'sl', parts(slices, 'spent'), 'br', broken,
  'st', row[10], 'pc', row[8], 'm', row[6], 'pv', row[9], 'mt', metadata, unpack(rare))
call('HSET', meta, 'n', seq, 'clk', now)
-- Rewritten, not edited: what stays for a day is small and packed.
call('DEL', session)
call('HSET', session, 'st', 'T', 'f', row[2], 'u', uid, 'k', kid, 'o', outcome, 'c', paid,
  'ab', owed, 'n', seq)
if outcome == 'swept' then call('HSET', session, 'te', now) end -- for its owner's correction
call('PEXPIRE', session, '86400000')
call('HSET', account, 'av', available, 'hd', held - has, 'tc', total, 'ns', open - 1)
if repaid + owing > 0 then call('HSET', account, 'db', debt - repaid + owing) end
if line > 0 then call('HSET', account, 'hc', on_line - line) end
for i = 1, #slices do
  local s = slices[i]
  call('HSET', grants, s.a_name, s.a, s.h_name, s.h, s.c_name, s.c)
  if s.lost then call('HSET', grants, s.lost_name, s.lost) end
end
if members and members[1] then call('ZREM', order, unpack(members)) end
call('ZREM', leases, uid .. '|' .. sid)
call('HSET', limits, 'p', math.max(0, slots - 1))
return { 'SETTLED', paid, owed, available, seq }
