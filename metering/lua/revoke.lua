#!lua
-- revoke: voids what nobody holds of one grant, and for ever. What sessions hold stays theirs to spend, and its unused
-- rest is voided when they end. Idempotent by grant id: a repeat answers what the first call did.
-- A grant that has not come yet is revoked all the same: `grant` then refuses it.
-- USES: words grants
-- KEYS: meta account order grants expiries outbox
-- ARGV: ep uid gid
-- RETURN: REVOKED|EXISTS amount available n | EPOCH | BOUNDS what
local meta, account, order, grants, expiries, outbox = unpack(KEYS)
local ep, uid, gid = unpack(ARGV)
if #KEYS ~= 6 or #ARGV ~= 3 then return { 'BOUNDS', 'arity' } end

if not (id(uid) and id(gid)) then return { 'BOUNDS', 'id' } end
local now, n = enter(meta, ep)
if not now then return { 'EPOCH' } end
local function field(name) return format('%s:%s', gid, name) end
local row = call('HMGET', grants, field('i'), field('a'), field('v'), field('z'), field('za'), field('zn'))
local available = stored(call('HGET', account, 'av'))
if row[4] then return { 'EXISTS', text(stored(row[5])), text(available), text(stored(row[6])) } end
local left, voided, members = stored(row[2]), stored(row[3]), listed(order, { [gid] = true })
if available < left then error({ err = 'BROKEN an account has less than its grant' }) end
call('ZCARD', expiries)
if not (may('HSET', meta) and may('HSET', account) and may('HSET', grants) and may('ZREM', order)
  and may('ZREM', expiries)) then
  error({ err = BARRED })
end

-- Writes: only the first can fail.
local seq, moment, taken = text(n + 1), text(now), text(left)
call('XADD', outbox, format('%s-%s', ep, seq), 't', 'revoke', 'u', uid, 'ts', moment, 'g', gid, 'a', taken)
call('HSET', meta, 'n', seq, 'clk', moment)
call('HSET', grants, field('z'), '1', field('za'), taken, field('zn'), seq)
if left > 0 then
  call('HSET', account, 'av', text(available - left))
  call('HSET', grants, field('a'), '0', field('v'), text(voided + left))
end
if #members > 0 then call('ZREM', order, unpack(members)) end
call('ZREM', expiries, format('%s|%s', uid, gid))
return { 'REVOKED', taken, text(available - left), seq }
