#!lua flags=allow-oom
-- sweep: settles on behalf of a dead owner what was metered at the last progress, once the lease is over.
-- A lease without a held session behind it is dropped, so that it cannot come up for ever.
-- KEYS: meta account order grants session leases limits outbox
-- ARGV: ep uid sid kid
-- RETURN: SETTLED charged absorbed available n | FINAL charged absorbed available n outcome | NOTDUE left_ms | UNKNOWN | EPOCH | BOUNDS what
local meta, account, order, grants, session, leases, limits, outbox = unpack(KEYS)
local ep, uid, sid, kid = unpack(ARGV)
if #KEYS ~= 8 or #ARGV ~= 4 then return { 'BOUNDS', 'arity' } end

if sub(session, 10) ~= sid then return { 'BOUNDS', 'id' } end
local now, n = enter(meta, ep)
if not now then return { 'EPOCH' } end
-- HERE: session
local member = uid .. '|' .. sid
local deadline = call('ZSCORE', leases, member)
if row[1] ~= 'H' then
  if deadline then call('ZREM', leases, member) end
  if row[1] ~= 'T' then return { 'UNKNOWN' } end
elseif row[3] ~= uid or row[4] ~= kid then
  return { 'BOUNDS', 'session' }
elseif deadline and deadline + 0 > now then
  return { 'NOTDUE', text(deadline - now) }
end
local charge, outcome, metadata = stored(row[6]), 'swept', ''
-- HERE: finish
