#!lua flags=allow-oom
-- settle: charges `charge` micros, returns the rest of the hold, journals the session. Once: a repeat answers FINAL.
-- Held slices pay first, in order; what they do not cover, available grants, then the credit line, as debt; what nobody
-- covers is absorbed by the house.
-- USES: line finish
-- KEYS: meta account order grants session leases limits outbox
-- ARGV: ep uid sid kid fence charge outcome metadata
-- RETURN: SETTLED charged absorbed available n | FINAL charged absorbed available n outcome | FENCED | UNKNOWN | EPOCH | BOUNDS what
local ep, uid, sid, kid, fence, charge, outcome, metadata = unpack(ARGV)
if #KEYS ~= 8 or #ARGV ~= 8 then return { 'BOUNDS', 'arity' } end

if sub(session, 10) ~= sid then return { 'BOUNDS', 'id' } end
local charge_n = amount(charge)
if not charge_n then return { 'BOUNDS', 'amount' } end
if outcome ~= 'completed' and outcome ~= 'aborted' and outcome ~= 'cut' and outcome ~= 'error'
  and not (outcome == 'void' and charge_n == 0) then
  return { 'BOUNDS', 'outcome' }
end
if #metadata > 4096 then return { 'BOUNDS', 'metadata' } end

local now, n = enter(meta, ep)
if not now then return { 'EPOCH' } end
local row = read_session()
if not row.st or row.st == 'V' then return { 'UNKNOWN' } end
if row.u ~= uid or row.k ~= kid then return { 'BOUNDS', 'session' } end
if row.f ~= fence then return { 'FENCED' } end
if row.st == 'T' then return final() end

return { 'SETTLED', finish(ep, sid, row, now, n, charge_n, outcome, metadata) }
