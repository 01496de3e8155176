#!lua
-- take: adjusts an account down. Up to `debit` micros of what is available, in burn order, are voided.
-- `whole` 1: all of it or nothing; 0: what there is. Decided once per `change` (the adjustment's id), also when nothing
-- was taken: the decision is journaled, and a repeat answers it.
-- USES: words burn holds grants
-- KEYS: meta account order grants outbox
-- ARGV: ep uid change debit whole
-- RETURN: TAKEN|EXISTS amount available n | CONFLICT | EPOCH | BOUNDS what
local meta, account, order, grants, outbox = unpack(KEYS)
local ep, uid, change, debit, whole = unpack(ARGV)
if #KEYS ~= 5 or #ARGV ~= 5 then return { 'BOUNDS', 'arity' } end

if not (id(uid) and id(change)) then return { 'BOUNDS', 'id' } end
local debit_n = amount(debit)
if not debit_n or debit_n == 0 then return { 'BOUNDS', 'amount' } end
if whole ~= '0' and whole ~= '1' then return { 'BOUNDS', 'whole' } end

local now, n = enter(meta, ep)
if not now then return { 'EPOCH' } end
-- Beside the grants' fields, under letters that no grant has, so that an equal id of a grant is no matter.
local function field(name) return format('%s:%s', change, name) end
local past = call('HMGET', grants, field('t'), field('tw'), field('ta'), field('tn'))
local available = stored(call('HGET', account, 'av'))
if past[1] then
  if stored(past[1]) ~= debit_n or past[2] ~= whole then return { 'CONFLICT' } end
  return { 'EXISTS', text(stored(past[3])), text(available), text(stored(past[4])) }
end
local plan, taken = plan_take(order, grants, debit_n, now)
if whole == '1' and taken < debit_n then plan, taken = {}, 0 end
if available < taken then error({ err = 'BROKEN an account has less than its grants' }) end
local before, dry = {}, {}
for i = 1, #plan do
  local p = plan[i]
  before[i] = stored(call('HGET', grants, format('%s:v', p.gid)))
  if p.a == p.take and p.h == 0 then dry[p.gid] = true end
end
local members = listed(order, dry)
if not (may('HSET', meta) and may('HSET', account) and may('HSET', grants) and may('ZREM', order)) then
  error({ err = BARRED })
end

-- Writes: only the first can fail.
local seq, moment, sum, left = text(n + 1), text(now), text(taken), text(available - taken)
call('XADD', outbox, format('%s-%s', ep, seq), 't', 'adjust', 'u', uid, 'ts', moment, 'j', change, 'a', sum,
  'sl', write_slices(plan))
call('HSET', meta, 'n', seq, 'clk', moment)
call('HSET', grants, field('t'), text(debit_n), field('tw'), whole, field('ta'), sum, field('tn'), seq)
if taken > 0 then call('HSET', account, 'av', left) end
for i = 1, #plan do
  local p = plan[i]
  call('HSET', grants, format('%s:a', p.gid), text(p.a - p.take), format('%s:v', p.gid), text(before[i] + p.take))
end
if #members > 0 then call('ZREM', order, unpack(members)) end
return { 'TAKEN', sum, left, seq }
