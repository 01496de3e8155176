-- Shared by every script: the loader puts this text between the shebang and the action.
--
-- Rules that each action keeps (docs/design of the ledger, rules proven by test):
--   all checks before all writes: every key that will be written is read with its own type first, and every command
--   that will write is one that the caller's user may run; the first write is its own check;
--   a number enters only through amount() or stored(). It leaves to a command or as an element of a busy verb's reply
--   as it is (the server writes whole numbers with all their digits), and else only through text() or '%.0f'. '..' is
--   for ids and field names alone;
--   keys come only from KEYS; a clock reading comes only from enter().
local call, may, format, find, sub = redis.call, redis.acl_check_cmd, string.format, string.find, string.sub
local MAX = 9007199254740991 -- 2^53 - 1: doubles count exactly up to here

-- A number as a string: tostring(1e14) would say 1e+14.
local function text(n) return n == 0 and '0' or format('%.0f', n) end

-- An argument as a number, or nil: digits only, at most MAX. No sign, exponent, hex, blank, nan or inf.
local function amount(s)
  if #s > 16 or not find(s, '^%d+$') then return nil end
  local n = s + 0
  if n > MAX then return nil end
  return n
end

-- A stored number, held to the same form; a missing field is 0. Anything else is damage: stop before any write.
local function stored(value)
  if not value or value == '0' then return 0 end
  if #value <= 16 and find(value, '^%d+$') then
    local n = value + 0
    if n <= MAX then return n end
  end
  error({ err = 'BROKEN a stored number is not an amount' })
end

-- The error where `may(command, key)` says no: a script that went on would be stopped between two of its writes.
local BARRED = 'NOPERM this user has no permissions for all that this script writes'

-- Milliseconds of the server's clock. Tests replace this function, nothing else.
local function wall_ms()
  local t = call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
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
