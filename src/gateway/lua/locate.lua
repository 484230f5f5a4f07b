-- Say where an agent is, and remember who asked: that node will be told when the agent moves or leaves.
--
-- KEYS[1]  the agent, see register.lua
-- ARGV[1]  number of the node that asks
--
-- Returns {node, worker, connection, epoch}, or nil.

local found = redis.call('HMGET', KEYS[1], 'n', 'w', 'c', 'e', 'q')
if not found[1] then
    return false
end
local asked = found[5] or ''
if not string.find(',' .. asked, ',' .. ARGV[1] .. ',', 1, true) then
    redis.call('HSET', KEYS[1], 'q', asked .. ARGV[1] .. ',')
end
return {found[1], found[2], found[3], found[4]}
