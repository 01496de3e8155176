#!lua
-- init: creates a shard's meta hash once. Never touches one that exists (a frozen or older epoch stays).
-- KEYS: meta
-- ARGV: ep
-- RETURN: CREATED ep | EXISTS ep | BOUNDS what
local meta = unpack(KEYS)
local ep = unpack(ARGV)
if #KEYS ~= 1 or #ARGV ~= 1 then return { 'BOUNDS', 'arity' } end
local number = amount(ep)
if not number or number == 0 then return { 'BOUNDS', 'ep' } end
local present = call('HGET', meta, 'ep')
if present then return { 'EXISTS', present } end
call('HSET', meta, 'ep', text(number), 'n', '0', 'clk', text(wall_ms()))
return { 'CREATED', text(number) }
