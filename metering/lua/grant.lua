#!lua
-- grant: issues credit to an account, which it creates when missing. Debt is repaid first. Idempotent by grant id.
-- `expiry` is ms or 0 for never; `created` is ms. At most 64 grants may be open at once. One that was revoked before it
-- came stays out.
-- USES: words
-- KEYS: meta account order grants expiries outbox
-- ARGV: ep uid gid credit priority expiry created
-- RETURN: GRANTED|EXISTS available n repaid | CONFLICT | REVOKED | FULL | EPOCH | BOUNDS what
local meta, account, order, grants, expiries, outbox = unpack(KEYS)
local ep, uid, gid, credit, priority, expiry, created = unpack(ARGV)
if #KEYS ~= 6 or #ARGV ~= 7 then return { 'BOUNDS', 'arity' } end

if not (id(uid) and id(gid)) then return { 'BOUNDS', 'id' } end
local credit_n, priority_n = amount(credit), amount(priority)
local expiry_n, created_n = amount(expiry), amount(created)
if not credit_n or credit_n == 0 then return { 'BOUNDS', 'amount' } end
if not priority_n or priority_n > 99 then return { 'BOUNDS', 'priority' } end
if not expiry_n or expiry_n >= 999999999999999 or not created_n then return { 'BOUNDS', 'time' } end

local now, n, _ = enter(meta, ep)
if not now then return { 'EPOCH' } end
local row = call('HMGET', account, 'av', 'hd', 'db', 'tc', 'ns')
local available, held, debt, total, open = stored(row[1]), stored(row[2]), stored(row[3]), stored(row[4]), stored(row[5])

local function field(name) return format('%s:%s', gid, name) end
local past = call('HMGET', grants, field('i'), field('e'), field('n'), field('rp'), field('z'))
if past[1] then
  if stored(past[1]) ~= credit_n or stored(past[2]) ~= expiry_n then return { 'CONFLICT' } end
  return { 'EXISTS', text(available), text(stored(past[3])), text(stored(past[4])) }
end
if past[5] then return { 'REVOKED' } end
-- Later moves only shift credit between these three, so this one check keeps all of them exact for ever.
if available + held + total + credit_n > MAX then return { 'BOUNDS', 'total' } end
local repaid = math.min(debt, credit_n)
local left = credit_n - repaid
if call('ZCARD', order) >= 64 and left > 0 then return { 'FULL' } end
call('ZCARD', expiries)
if not (may('HSET', meta) and may('HSET', account) and may('HSET', grants) and may('ZADD', order)
  and may('ZADD', expiries)) then
  error({ err = BARRED })
end

-- Writes: only the first can fail.
local seq, moment, balance = text(n + 1), text(now), text(available + left)
call('XADD', outbox, format('%s-%s', ep, seq), 't', 'grant', 'u', uid, 'ts', moment, 'g', gid, 'a', text(credit_n),
  'p', text(priority_n), 'e', text(expiry_n), 'f', text(created_n), 'rp', text(repaid))
call('HSET', meta, 'n', seq, 'clk', moment)
call('HSET', account, 'av', balance, 'hd', held, 'db', debt - repaid, 'tc', total, 'ns', open)
call('HSET', grants, field('i'), text(credit_n), field('a'), text(left), field('h'), '0', field('c'), text(repaid),
  field('x'), '0', field('v'), '0', field('e'), text(expiry_n), field('n'), seq)
if repaid > 0 then call('HSET', grants, field('rp'), text(repaid)) end
if left > 0 then
  local member = format('%02.0f|%015.0f|%016.0f|%s', priority_n, expiry_n == 0 and 999999999999999 or expiry_n, created_n, gid)
  call('ZADD', order, '0', member)
  if expiry_n > 0 then call('ZADD', expiries, text(expiry_n), format('%s|%s', uid, gid)) end
end
return { 'GRANTED', balance, seq, text(repaid) }
