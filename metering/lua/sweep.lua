#!lua flags=allow-oom
-- sweep: settles on behalf of a dead owner what was metered at the last progress, once the lease is over.
-- A lease without a held session behind it is dropped, so that it cannot come up for ever.
-- USES: line finish
-- KEYS: meta account order grants session leases limits outbox
-- ARGV: ep uid sid kid
-- RETURN: SETTLED charged absorbed available n | FINAL charged absorbed available n outcome | NOTDUE left_ms | UNKNOWN | EPOCH | BOUNDS what
local ep, uid, sid, kid = unpack(ARGV)
if #KEYS ~= 8 or #ARGV ~= 4 then return { 'BOUNDS', 'arity' } end

if sub(session, 10) ~= sid then return { 'BOUNDS', 'id' } end
local now, n = enter(meta, ep)
if not now then return { 'EPOCH' } end
local row = read_session()
local member = format('%s|%s', uid, sid)
local deadline = call('ZSCORE', leases, member)
if row.st ~= 'H' then
  if deadline then call('ZREM', leases, member) end
  if row.st == 'T' then return final() end
  return { 'UNKNOWN' }
end
if row.u ~= uid or row.k ~= kid then return { 'BOUNDS', 'session' } end
if deadline and tonumber(deadline) > now then return { 'NOTDUE', text(tonumber(deadline) - now) } end

return { 'SETTLED', finish(ep, sid, row, now, n, stored(row.m), 'swept', '') }
