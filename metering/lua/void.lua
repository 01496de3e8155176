#!lua flags=allow-oom
-- void: returns the whole hold and charges nothing. An unknown session gets a tombstone for a day, without a journal
-- entry, so that a reserve that was delayed on its way is refused when it comes.
-- `fence` 0 says that reserve's answer never came: accepted while the session has made no progress.
-- USES: line finish
-- KEYS: meta account order grants session leases limits outbox
-- ARGV: ep uid sid kid fence metadata
-- RETURN: SETTLED charged absorbed available n | FINAL charged absorbed available n outcome | TOMBSTONE | FENCED | EPOCH | BOUNDS what
local ep, uid, sid, kid, fence, metadata = unpack(ARGV)
if #KEYS ~= 8 or #ARGV ~= 6 then return { 'BOUNDS', 'arity' } end

if sub(session, 10) ~= sid then return { 'BOUNDS', 'id' } end
if #metadata > 4096 then return { 'BOUNDS', 'metadata' } end

local now, n, saved = enter(meta, ep)
if not now then return { 'EPOCH' } end
local row = read_session()
if not row.st then
  if not id(sid) then return { 'BOUNDS', 'id' } end
  if now > saved then call('HSET', meta, 'clk', text(now)) end
  call('HSET', session, 'st', 'V', 'ts', text(now))
  call('PEXPIRE', session, DAY_MS)
  return { 'TOMBSTONE' }
end
if row.st == 'V' then return { 'TOMBSTONE' } end
if row.u ~= uid or row.k ~= kid then return { 'BOUNDS', 'session' } end
if row.f ~= fence and not (fence == '0' and row.st == 'H' and row.q == '0') then return { 'FENCED' } end
if row.st == 'T' then return final() end

return { 'SETTLED', finish(ep, sid, row, now, n, 0, 'void', metadata) }
