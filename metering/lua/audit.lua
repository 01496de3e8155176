#!lua flags=no-writes
-- audit: one account as it stands at one instant: its hash, every grant's fields, the burn order, and of each named
-- session its state, hold, metered cost, slices, lease and part on the credit line. `sids` are the ids behind the session keys, in their order.
-- USES: words
-- KEYS: meta account order grants leases sessions...
-- ARGV: ep uid sids...
-- RETURN: SNAPSHOT ep n now account grants order sessions | EPOCH | BOUNDS what
local meta, account, order, grants, leases = unpack(KEYS)
local ep, uid = unpack(ARGV)
if #KEYS < 5 or #ARGV ~= #KEYS - 3 then return { 'BOUNDS', 'arity' } end

if not id(uid) then return { 'BOUNDS', 'id' } end
for i = 3, #ARGV do
  if not id(ARGV[i]) then return { 'BOUNDS', 'id' } end
end
local now, n = enter(meta, ep)
if not now then return { 'EPOCH' } end
local sessions = {}
for i = 3, #ARGV do
  local row = call('HMGET', KEYS[i + 3], 'st', 'u', 'h', 'm', 'sl', 'hl')
  local deadline = call('ZSCORE', leases, format('%s|%s', uid, ARGV[i]))
  sessions[i - 2] = { ARGV[i], row[1] or '', row[2] or '', row[3] or '0', row[4] or '0', row[5] or '',
    deadline and text(tonumber(deadline)) or '', row[6] or '0' }
end
return { 'SNAPSHOT', ep, text(n), text(now), call('HGETALL', account), call('HGETALL', grants),
  call('ZRANGE', order, '0', '-1'), sessions }
