#!lua flags=allow-oom
-- settle: charges `charge` micros, returns the rest of the hold, journals the session. Once: a repeat answers FINAL.
-- Held slices pay first, in order; what they do not cover, available grants, then the credit line, as debt; what nobody
-- covers is absorbed by the house.
-- KEYS: meta account order grants session leases limits outbox
-- ARGV: ep uid sid kid fence charge outcome metadata
-- RETURN: SETTLED charged absorbed available n | FINAL charged absorbed available n outcome | FENCED | UNKNOWN | EPOCH | BOUNDS what
local meta, account, order, grants, session, leases, limits, outbox = unpack(KEYS)
local ep, uid, sid, kid, fence, charge, outcome, metadata = unpack(ARGV)
if #KEYS ~= 8 or #ARGV ~= 8 then return { 'BOUNDS', 'arity' } end

if sub(session, 10) ~= sid then return { 'BOUNDS', 'id' } end
charge = amount(charge)
if not charge then return { 'BOUNDS', 'amount' } end
if outcome ~= 'completed' and outcome ~= 'aborted' and outcome ~= 'cut' and outcome ~= 'error'
  and not (outcome == 'void' and charge == 0) then
  return { 'BOUNDS', 'outcome' }
end
if #metadata > 4096 then return { 'BOUNDS', 'metadata' } end

local now, n = enter(meta, ep)
if not now then return { 'EPOCH' } end
-- HERE: session
if not row[1] or row[1] == 'V' then return { 'UNKNOWN' } end
if row[3] ~= uid or row[4] ~= kid then return { 'BOUNDS', 'session' } end
if row[2] ~= fence then return { 'FENCED' } end
-- HERE: finish
