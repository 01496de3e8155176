#!lua flags=no-writes
-- due: the shard's sessions whose lease is over, oldest first.
-- KEYS: meta leases
-- ARGV: ep limit
-- RETURN: DUE uid|sid... | EPOCH | BOUNDS what
local meta, leases = unpack(KEYS)
local ep, limit = unpack(ARGV)
if #KEYS ~= 2 or #ARGV ~= 2 then return { 'BOUNDS', 'arity' } end
local count = amount(limit)
if not count or count > 10000 then return { 'BOUNDS', 'limit' } end
local now = enter(meta, ep)
if not now then return { 'EPOCH' } end
local members = call('ZRANGEBYSCORE', leases, '-inf', text(now), 'LIMIT', '0', text(count))
return { 'DUE', unpack(members) }
