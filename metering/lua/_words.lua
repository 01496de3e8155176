-- Shared by what takes words that others do not vouch for.

-- Ids go into zset members and slice lists, so none of their separators (| = , :) may pass.
local function id(s) return #s <= 64 and find(s, '^[%w_-]+$') end

-- Opaque short words (owner, body hash, price version): visible ASCII.
local function word(s) return #s <= 128 and find(s, '^[!-~]*$') end
