-- Shared by expire, revoke and take, which end credit that nobody holds.

-- Members of the burn order that name one of the grants in `wanted` (gid -> true). At most 64 grants are open, and
-- these verbs are rare, so a scan is cheap.
local function listed(order, wanted)
  local members, out = call('ZRANGE', order, '0', '-1'), {}
  for i = 1, #members do
    if wanted[sub(members[i], 37)] then out[#out + 1] = members[i] end
  end
  return out
end
