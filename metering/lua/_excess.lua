-- Shared by what charges more than was held: the rest comes from available grants, in burn order.

-- Adds to `slices`, or to those of them that are of the same grants; answers what was found.
local function spend_available(slices, excess, now)
  local plan, got = plan_take(order, grants, excess, now)
  local place = {}
  for i = 1, #slices do place[slices[i].gid] = slices[i] end
  for i = 1, #plan do
    local p = plan[i]
    local gid = p.gid
    local slice = place[gid]
    if not slice then
      local c_name = gid .. ':c'
      slice = { gid = gid, spent = 0, repaid = 0, voided = 0, broken = 0, a = p.a, h = p.h,
        c = stored(call('HGET', grants, c_name)), a_name = p.a_name, h_name = p.h_name, c_name = c_name }
      slices[#slices + 1] = slice
    end
    slice.a, slice.c, slice.spent = slice.a - p.take, slice.c + p.take, slice.spent + p.take
  end
  return got
end
