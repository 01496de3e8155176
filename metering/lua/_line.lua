-- Shared by what holds or charges: the account's credit line, for what its grants do not cover.
-- `lim` is the most that debt and held line may come to; 0 or absent for an account under cutoff.

-- The line's free room and what of it is held, of an account with these figures. Read only when grants fall short, so
-- that nobody else pays for it. A limit that was lowered below what is owed leaves no room. av + hd + tc stays <= MAX,
-- as `grant` leaves it, so that every later sum is exact.
local function line_room(account, available, held)
  local row = call('HMGET', account, 'lim', 'hc', 'db', 'tc')
  local on_line = stored(row[2])
  local free = stored(row[1]) - on_line - stored(row[3])
  return math.max(0, math.min(free, MAX - available - held - stored(row[4]))), on_line
end
