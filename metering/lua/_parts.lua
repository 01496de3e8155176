-- Shared by what ends in a journal entry with slices.

-- 'gid=amount,...' of one part of the slices, without zeros.
local function parts(slices, name)
  if #slices == 1 and slices[1][name] > 0 then return format('%s=%.0f', slices[1].gid, slices[1][name]) end
  local out = {}
  for i = 1, #slices do
    local part = slices[i][name]
    if part > 0 then out[#out + 1] = format('%s=%.0f', slices[i].gid, part) end
  end
  return table.concat(out, ',')
end
