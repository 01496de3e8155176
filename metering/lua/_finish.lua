-- Shared by settle, void, sweep and correct, whose KEYS are the same: the one place where a session ends.
-- Everything is read and computed before the first write; the first write is the XADD, the only one that can refuse
-- for a reason that no type check shows (a stream already ahead of n). It is therefore its own check.
local meta, account, order, grants, session, leases, limits, outbox = unpack(KEYS)
local DAY_MS = '86400000'

-- What one slice becomes: gid, take, spent, repaid, voided, broken and back, with the grant's new a, h, c, x, v.
-- Its unused rest is voided when its grant is revoked. Else it repays debt first, then returns to its grant, or to
-- breakage when that has expired.
local function end_slice(slice, charge, debt, now)
  local gid, take = slice.gid, slice.take
  slice.a_name, slice.h_name, slice.c_name = format('%s:a', gid), format('%s:h', gid), format('%s:c', gid)
  local row = call('HMGET', grants, slice.a_name, slice.h_name, slice.c_name, format('%s:x', gid), format('%s:e', gid),
    format('%s:z', gid), format('%s:v', gid))
  local expiry = stored(row[5])
  slice.spent = math.min(take, charge)
  slice.voided = row[6] and take - slice.spent or 0
  slice.repaid = math.min(take - slice.spent - slice.voided, debt)
  local rest = take - slice.spent - slice.voided - slice.repaid
  slice.broken = expiry > 0 and expiry <= now and rest or 0
  slice.back = rest - slice.broken
  slice.a, slice.h = stored(row[1]) + slice.back, stored(row[2]) - take
  slice.c, slice.x = stored(row[3]) + slice.spent + slice.repaid, stored(row[4]) + slice.broken
  slice.v = stored(row[7]) + slice.voided
  if slice.h < 0 then error({ err = 'BROKEN a grant holds less than its session' }) end
end

-- What the hold did not cover: from available grants in burn order. Adds to `slices`; returns what was found.
local function spend_available(slices, excess, now)
  local plan, got = plan_take(order, grants, excess, now)
  local place = {}
  for i = 1, #slices do place[slices[i].gid] = slices[i] end
  for i = 1, #plan do
    local p = plan[i]
    local slice = place[p.gid]
    if not slice then
      slice = { gid = p.gid, spent = 0, repaid = 0, voided = 0, broken = 0, a = p.a, h = p.h,
        a_name = format('%s:a', p.gid), h_name = format('%s:h', p.gid), c_name = format('%s:c', p.gid) }
      slice.c = stored(call('HGET', grants, slice.c_name))
      slices[#slices + 1] = slice
    end
    slice.a, slice.c, slice.spent = slice.a - p.take, slice.c + p.take, slice.spent + p.take
  end
  return got
end

-- 'gid=amount,...' of one part of the slices, without zeros.
local function parts(slices, name)
  if #slices == 1 then
    return slices[1][name] > 0 and format('%s=%.0f', slices[1].gid, slices[1][name]) or ''
  end
  local out = {}
  for i = 1, #slices do
    if slices[i][name] > 0 then out[#out + 1] = format('%s=%.0f', slices[i].gid, slices[i][name]) end
  end
  return table.concat(out, ',')
end

-- Fields of the entry that most entries lack.
local function rare_fields(slices)
  local out, repaid, voided = {}, parts(slices, 'repaid'), parts(slices, 'voided')
  if repaid ~= '' then out[1], out[2] = 'rp', repaid end
  if voided ~= '' then out[#out + 1], out[#out + 2] = 'vd', voided end
  return out
end

-- Members of the burn order whose grants have nothing left. Grants run dry rarely, so a scan of at most 64 is cheap.
local function dry_members(slices)
  local dry, out = nil, {}
  for i = 1, #slices do
    if slices[i].a == 0 and slices[i].h == 0 then
      dry = dry or {}
      dry[slices[i].gid] = true
    end
  end
  if not dry then return out end
  local members = call('ZRANGE', order, '0', '-1')
  for i = 1, #members do
    if dry[sub(members[i], 37)] then out[#out + 1] = members[i] end
  end
  return out
end

-- The write half of end_slice and spend_available.
local function write_grants(slices, dry)
  for i = 1, #slices do
    local s = slices[i]
    call('HSET', grants, s.a_name, text(s.a), s.h_name, text(s.h), s.c_name, text(s.c))
    if s.broken > 0 then call('HSET', grants, format('%s:x', s.gid), text(s.x)) end
    if s.voided > 0 then call('HSET', grants, format('%s:v', s.gid), text(s.v)) end
  end
  if #dry > 0 then call('ZREM', order, unpack(dry)) end
end

-- Ends the held session `row` (from read_session). Answers charged, absorbed, available, n as text.
local function finish(ep, sid, row, now, n, charge, outcome, metadata)
  local money = call('HMGET', account, 'av', 'hd', 'db', 'tc', 'ns')
  local available, held, debt, open = stored(money[1]), stored(money[2]), stored(money[3]), stored(money[5])
  local has, slots = stored(row.h), stored(call('HGET', limits, 'p'))
  call('ZCARD', leases)
  if held < has or open == 0 then error({ err = 'BROKEN an account holds less than its session' }) end

  local slices, owed, repaid = read_slices(row.sl), charge, 0
  for i = 1, #slices do
    local slice = slices[i]
    end_slice(slice, owed, debt - repaid, now)
    owed, repaid, available = owed - slice.spent, repaid + slice.repaid, available + slice.back
  end
  if owed > 0 then
    local found = spend_available(slices, owed, now)
    owed, available = owed - found, available - found
  end
  -- Then the credit line: what the hold has of it, and its free room. What is used becomes debt, the rest is free again.
  local line, owing, on_line = stored(row.hl), 0, 0
  if line > 0 or owed > 0 then
    local room
    room, on_line = line_room(account, stored(money[1]), held)
    if on_line < line then error({ err = 'BROKEN an account holds less of its line than its session' }) end
    owing = math.min(owed, line + room)
    owed = owed - owing
  end
  local dry = dry_members(slices)
  local seq, moment, paid, absorbed = text(n + 1), text(now), text(charge - owed), text(owed)
  local left, total = text(available), text(stored(money[4]) + (charge - owed))
  if metadata == '' then metadata = call('HGET', session, 'mt') or '' end

  -- Writes: only the first can fail.
  call('XADD', outbox, format('%s-%s', ep, seq), 't', 'settle', 'u', row.u, 'ts', moment, 's', sid, 'k', row.k,
    'o', outcome, 'c', paid, 'ab', absorbed, 'd', text(owing), 'sl', parts(slices, 'spent'), 'br', parts(slices, 'broken'),
    'st', row.ts, 'pc', row.pc, 'm', row.m, 'pv', row.pv, 'mt', metadata,
    unpack(rare_fields(slices)))
  call('HSET', meta, 'n', seq, 'clk', moment)
  -- Rewritten, not edited: what stays for a day is small and packed.
  call('DEL', session)
  call('HSET', session, 'st', 'T', 'f', row.f, 'u', row.u, 'k', row.k, 'ts', row.ts, 'm', row.m, 'o', outcome,
    'c', paid, 'ab', absorbed, 'n', seq)
  if outcome == 'swept' then call('HSET', session, 'te', moment) end -- for its owner's correction
  call('PEXPIRE', session, DAY_MS)
  call('HSET', account, 'av', left, 'hd', text(held - has), 'db', text(debt - repaid + owing), 'tc', total,
    'ns', text(open - 1))
  if line > 0 then call('HSET', account, 'hc', text(on_line - line)) end
  write_grants(slices, dry)
  call('ZREM', leases, format('%s|%s', row.u, sid))
  call('HSET', limits, 'p', text(math.max(0, slots - 1)))
  return paid, absorbed, left, seq
end

local function read_session()
  local v = call('HMGET', session, 'st', 'f', 'u', 'k', 'h', 'm', 'q', 'pc', 'pv', 'ts', 'sl', 'hl')
  return { st = v[1], f = v[2], u = v[3], k = v[4], h = v[5], m = v[6], q = v[7], pc = v[8], pv = v[9], ts = v[10],
    sl = v[11], hl = v[12] }
end

-- The answer to a repeat: what the first call said, and the balance now.
local function final()
  local v = call('HMGET', session, 'c', 'ab', 'n', 'o')
  return { 'FINAL', v[1], v[2], text(stored(call('HGET', account, 'av'))), v[3], v[4] }
end
