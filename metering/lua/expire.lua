#!lua
-- expire: what nobody holds of one grant becomes breakage once its time is over. What sessions hold stays theirs to
-- spend, and its unused rest breaks when they end. Idempotent: DONE when there is nothing (more) to move.
-- An expiry without a grant that expires behind it is dropped, so that it cannot come up for ever.
-- USES: words grants
-- KEYS: meta account order grants expiries outbox
-- ARGV: ep uid gid
-- RETURN: EXPIRED amount available n | DONE | NOTDUE left_ms | UNKNOWN | EPOCH | BOUNDS what
local meta, account, order, grants, expiries, outbox = unpack(KEYS)
local ep, uid, gid = unpack(ARGV)
if #KEYS ~= 6 or #ARGV ~= 3 then return { 'BOUNDS', 'arity' } end

if not (id(uid) and id(gid)) then return { 'BOUNDS', 'id' } end
local now, n, saved = enter(meta, ep)
if not now then return { 'EPOCH' } end
local function field(name) return format('%s:%s', gid, name) end
local row = call('HMGET', grants, field('i'), field('a'), field('x'), field('e'))
local left, expired, expiry = stored(row[2]), stored(row[3]), stored(row[4])
local member = format('%s|%s', uid, gid)
if not row[1] or expiry == 0 then
  call('ZREM', expiries, member)
  return { 'UNKNOWN' }
end
if expiry > now then return { 'NOTDUE', text(expiry - now) } end
local available, members = stored(call('HGET', account, 'av')), listed(order, { [gid] = true })
if available < left then error({ err = 'BROKEN an account has less than its grant' }) end
call('ZCARD', expiries)
if not (may('HSET', meta) and may('HSET', account) and may('HSET', grants) and may('ZREM', order)
  and may('ZREM', expiries) and may('XADD', outbox)) then
  error({ err = BARRED })
end

-- Writes: only the first can fail.
local seq, moment = text(n + 1), text(now)
if left > 0 then
  call('XADD', outbox, format('%s-%s', ep, seq), 't', 'expire', 'u', uid, 'ts', moment, 'g', gid, 'a', text(left))
  call('HSET', meta, 'n', seq, 'clk', moment)
  call('HSET', account, 'av', text(available - left))
  call('HSET', grants, field('a'), '0', field('x'), text(expired + left))
elseif now > saved then
  call('HSET', meta, 'clk', moment)
end
if #members > 0 then call('ZREM', order, unpack(members)) end
call('ZREM', expiries, member)
if left == 0 then return { 'DONE' } end
return { 'EXPIRED', text(left), text(available - left), seq }
