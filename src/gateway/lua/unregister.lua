-- Forget an agent, if the session that ends still owns it.
--
-- KEYS[1]  the agent, see register.lua
-- KEYS[2]  set of the DIDs of the worker
-- ARGV[1]  what all keys begin with
-- ARGV[2]  key of the DID
-- ARGV[3]  epoch of the session
--
-- Returns the numbers of the nodes that asked where it was, each followed by a comma; nil if another session
-- owns it.

local old = redis.call('HMGET', KEYS[1], 'e', 'x', 'q', 'h', 'k')
if old[1] ~= ARGV[3] then
    return false
end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[2])
for _, term in ipairs(cjson.decode(old[2])) do
    redis.call('ZREM', ARGV[1] .. term, ARGV[2])
end
redis.call('PUBLISH', ARGV[1] .. 'presence',
           'leave\n' .. ARGV[2] .. '\noffline\n' .. old[4] .. '\n\n' .. #old[5] .. '\n' .. old[5])
return old[3] or ''
