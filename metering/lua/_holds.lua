-- Shared by what holds credit: reserve, progress and reassert (and `take`, which writes the same list).

-- The write half of plan_take for holds: available -> held.
local function hold(grants, plan)
  for i = 1, #plan do
    local p = plan[i]
    call('HSET', grants, p.a_name, p.a - p.take, p.h_name, p.h + p.take)
  end
end

-- 'gid=amount,gid=amount' of a list of { gid, take }, in the order in which credit was taken.
local function write_slices(slices)
  if #slices == 1 then return format('%s=%.0f', slices[1].gid, slices[1].take) end
  local parts = {}
  for i = 1, #slices do parts[i] = format('%s=%.0f', slices[i].gid, slices[i].take) end
  return table.concat(parts, ',')
end
