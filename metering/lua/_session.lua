-- The session as settle, void and sweep need it: { state, fence, uid, kid, hold, metered, last q, prompt cost, price
-- version, begun, slices, part on the credit line }.
local row = call('HMGET', session, 'st', 'f', 'u', 'k', 'h', 'm', 'q', 'pc', 'pv', 'ts', 'sl', 'hl')
