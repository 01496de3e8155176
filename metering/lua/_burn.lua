-- Shared by what takes credit from grants: the burn order.

-- Reads, in burn order, what `need` would take from grants that have not expired at `now`. Writes nothing.
-- Answers a list of { gid, take, a, h and the names of their fields } and the sum of its takes. Pages grow 1, 4, 16,
-- 64, so that the usual case (the first grant covers it) costs one member; only grants that give are read further than
-- their name.
local function plan_take(order, grants, need, now)
  local plan, got, first, size = {}, 0, 0, 1
  while got < need do
    local members = call('ZRANGE', order, first, first + size - 1)
    for i = 1, #members do
      if got < need and sub(members[i], 4, 18) + 0 > now then
        local gid = sub(members[i], 37)
        local a_name, h_name = gid .. ':a', gid .. ':h'
        local row = call('HMGET', grants, a_name, h_name)
        local a = stored(row[1])
        if a > 0 then
          local take = math.min(a, need - got)
          plan[#plan + 1] = { gid = gid, take = take, a = a, h = stored(row[2]), a_name = a_name, h_name = h_name }
          got = got + take
        end
      end
    end
    if #members < size then break end
    first, size = first + size, size * 4
  end
  return plan, got
end
