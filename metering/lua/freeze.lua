#!lua flags=allow-oom
-- freeze: stops a shard. Its epoch becomes '-1', which no caller has, so every script answers EPOCH until it is rebuilt
-- or found whole; the former one is kept in `was`. A shard without meta gets one, frozen. Idempotent.
-- `ep` is the epoch that the caller distrusts: a shard that has another one by now is left alone. '' stands for any.
-- KEYS: meta
-- ARGV: ep
-- RETURN: FROZEN was n | EPOCH | BOUNDS what
local meta = unpack(KEYS)
local ep = unpack(ARGV)
if #KEYS ~= 1 or #ARGV ~= 1 then return { 'BOUNDS', 'arity' } end

local row = call('HMGET', meta, 'ep', 'n', 'was')
local former, n = row[1] or '', text(stored(row[2]))
if ep ~= '' and ep ~= former then return { 'EPOCH' } end
if former == '-1' then return { 'FROZEN', row[3] or '', n } end
-- Writes: nothing below can fail.
call('HSET', meta, 'ep', '-1', 'was', former)
return { 'FROZEN', former, n }
