#!lua flags=allow-oom
-- void: returns the whole hold and charges nothing. An unknown session gets a tombstone for a day, without a journal
-- entry, so that a reserve that was delayed on its way is refused when it comes.
-- `fence` 0 says that reserve's answer never came: accepted while the session has made no progress, and again
-- once it is voided.
-- USES: words
-- KEYS: meta account order grants session leases limits outbox
-- ARGV: ep uid sid kid fence metadata
-- RETURN: SETTLED charged absorbed available n | FINAL charged absorbed available n outcome | TOMBSTONE | FENCED | EPOCH | BOUNDS what
local meta, account, order, grants, session, leases, limits, outbox = unpack(KEYS)
local ep, uid, sid, kid, fence, metadata = unpack(ARGV)
if #KEYS ~= 8 or #ARGV ~= 6 then return { 'BOUNDS', 'arity' } end

if sub(session, 10) ~= sid then return { 'BOUNDS', 'id' } end
if #metadata > 4096 then return { 'BOUNDS', 'metadata' } end

local now, n, saved = enter(meta, ep)
if not now then return { 'EPOCH' } end
-- HERE: session
if not row[1] then
  if not id(sid) then return { 'BOUNDS', 'id' } end
  if not (may('HSET', session) and may('PEXPIRE', session)) then error({ err = BARRED }) end
  if now > saved then call('HSET', meta, 'clk', now) end
  call('HSET', session, 'st', 'V', 'ts', now)
  call('PEXPIRE', session, '86400000')
  return { 'TOMBSTONE' }
end
if row[1] == 'V' then return { 'TOMBSTONE' } end
if row[3] ~= uid or row[4] ~= kid then return { 'BOUNDS', 'session' } end
if row[2] ~= fence and not (fence == '0' and (row[1] == 'H' and row[7] == '0'
  or row[1] == 'T' and call('HGET', session, 'o') == 'void')) then
  return { 'FENCED' }
end
local charge, outcome = 0, 'void'
-- HERE: finish
