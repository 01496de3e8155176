#!lua flags=no-writes
-- expiring: the shard's grants whose time is over, the longest over first.
-- KEYS: meta expiries
-- ARGV: ep limit
-- RETURN: DUE uid|gid... | EPOCH | BOUNDS what
local meta, expiries = unpack(KEYS)
local ep, limit = unpack(ARGV)
if #KEYS ~= 2 or #ARGV ~= 2 then return { 'BOUNDS', 'arity' } end
local count = amount(limit)
if not count or count > 10000 then return { 'BOUNDS', 'limit' } end
local now = enter(meta, ep)
if not now then return { 'EPOCH' } end
local members = call('ZRANGEBYSCORE', expiries, '-inf', text(now), 'LIMIT', '0', text(count))
return { 'DUE', unpack(members) }
