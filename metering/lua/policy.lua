#!lua
-- policy: what an account may do when its grants are used up, and how far: `limit` micros of debt and held line
-- together, 0 under cutoff. `revision` rises with each change, so that a late repeat undoes nothing. Idempotent: the same revision
-- with another policy or limit is a CONFLICT.
-- Holds that stand on the line keep it when the limit falls.
-- USES: words
-- KEYS: meta account outbox
-- ARGV: ep uid policy limit revision
-- RETURN: SET|EXISTS|STALE debt held_line n | CONFLICT | EPOCH | BOUNDS what
local meta, account, outbox = unpack(KEYS)
local ep, uid, policy, limit, revision = unpack(ARGV)
if #KEYS ~= 3 or #ARGV ~= 5 then return { 'BOUNDS', 'arity' } end

if not id(uid) or sub(account, 10) ~= uid then return { 'BOUNDS', 'id' } end
if policy ~= 'cutoff' and policy ~= 'grace' and policy ~= 'postpaid' then return { 'BOUNDS', 'policy' } end
local limit_n, revision_n = amount(limit), amount(revision)
if not limit_n or (policy == 'cutoff' and limit_n > 0) then return { 'BOUNDS', 'limit' } end
if not revision_n or revision_n == 0 then return { 'BOUNDS', 'revision' } end

local now, n = enter(meta, ep)
if not now then return { 'EPOCH' } end
local row = call('HMGET', account, 'db', 'hc', 'pr', 'pn', 'pol', 'lim')
local debt, on_line, before = text(stored(row[1])), text(stored(row[2])), stored(row[3])
if before > revision_n then return { 'STALE', debt, on_line, text(stored(row[4])) } end
if before == revision_n then
  if row[5] ~= policy or stored(row[6]) ~= limit_n then return { 'CONFLICT' } end
  return { 'EXISTS', debt, on_line, text(stored(row[4])) }
end
if not (may('HSET', meta) and may('HSET', account)) then error({ err = BARRED }) end

-- Writes: only the first can fail.
local seq, moment = text(n + 1), text(now)
call('XADD', outbox, format('%s-%s', ep, seq), 't', 'policy', 'u', uid, 'ts', moment, 'pl', policy,
  'a', text(limit_n), 'r', text(revision_n))
call('HSET', meta, 'n', seq, 'clk', moment)
call('HSET', account, 'pol', policy, 'lim', text(limit_n), 'pr', text(revision_n), 'pn', seq)
return { 'SET', debt, on_line, seq }
