-- Shared by every script: the loader puts this text between the shebang and the action.
--
-- Rules that each action keeps (docs/design of the ledger, rules proven by test):
--   all checks before all writes, every key that will be written is read with its own type first;
--   a number leaves Lua only through text(), and enters only through amount() or stored();
--   keys come only from KEYS; a clock reading comes only from enter().
local call, format, find, sub = redis.call, string.format, string.find, string.sub
local MAX = 9007199254740991 -- 2^53 - 1: doubles count exactly up to here

-- The one way out for a number: tostring(1e14) would say 1e+14.
local function text(n) return format('%.0f', n) end

-- An argument as a number, or nil: digits only, at most MAX. No sign, exponent, hex, blank, nan or inf.
local function amount(s)
  if #s > 16 or not find(s, '^%d+$') then return nil end
  local n = tonumber(s)
  if n > MAX then return nil end
  return n
end

-- A stored number, held to the same form; a missing field is 0. Anything else is damage: stop before any write.
local function stored(value)
  if not value then return 0 end
  local n = amount(value)
  if not n then error({ err = 'BROKEN a stored number is not an amount' }) end
  return n
end

-- Ids go into zset members and slice lists, so none of their separators (| = , :) may pass.
local function id(s) return #s <= 64 and s ~= '' and not find(s, '[^%w_-]') end

-- Opaque short words (owner, body hash, price version): visible ASCII.
local function word(s) return #s <= 128 and not find(s, '[^!-~]') end

-- Milliseconds of the server's clock. Tests replace this function, nothing else.
local function wall_ms()
  local t = call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

-- Admission to the shard: (now, n, saved clock), or nil when the epoch is not the caller's.
-- now = max(server time, saved clock): the shard's time never goes back, also across a failover.
local function enter(meta, ep)
  local row = call('HMGET', meta, 'ep', 'n', 'clk')
  if row[1] ~= ep then return nil end
  local saved, now = stored(row[3]), wall_ms()
  if saved > now then now = saved end
  return now, stored(row[2]), saved
end

-- Reads, in burn order, what `need` would take from grants that have not expired at `now`. Writes nothing.
-- Answers a list of { gid, take, a, h } and the sum of its takes. Pages grow 1, 4, 16, 64, so that the usual case
-- (the first grant covers it) costs one member; only grants that give are read further than their name.
local function plan_take(order, grants, need, now)
  local plan, got, first, size = {}, 0, 0, 1
  while got < need do
    local members = call('ZRANGE', order, text(first), text(first + size - 1))
    for i = 1, #members do
      if got < need and tonumber(sub(members[i], 4, 18)) > now then
        local gid = sub(members[i], 37)
        local row = call('HMGET', grants, format('%s:a', gid), format('%s:h', gid))
        local a = stored(row[1])
        if a > 0 then
          local take = math.min(a, need - got)
          plan[#plan + 1] = { gid = gid, take = take, a = a, h = stored(row[2]) }
          got = got + take
        end
      end
    end
    if #members < size then break end
    first, size = first + size, size * 4
  end
  return plan, got
end

-- The write half of plan_take for holds: available -> held.
local function hold(grants, plan)
  for i = 1, #plan do
    local p = plan[i]
    call('HSET', grants, format('%s:a', p.gid), text(p.a - p.take), format('%s:h', p.gid), text(p.h + p.take))
  end
end

-- 'gid=amount,gid=amount' <-> a list of { gid, take }, in the order in which credit was taken.
local function read_slices(list)
  local slices = {}
  for gid, take in string.gmatch(list or '', '([^=,]+)=(%d+)') do
    slices[#slices + 1] = { gid = gid, take = stored(take) }
  end
  return slices
end

local function write_slices(slices)
  if #slices == 1 then return format('%s=%.0f', slices[1].gid, slices[1].take) end
  local parts = {}
  for i = 1, #slices do parts[i] = format('%s=%.0f', slices[i].gid, slices[i].take) end
  return table.concat(parts, ',')
end
