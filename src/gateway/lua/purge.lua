-- Remove some of what a worker owned that is gone; and its node, once nothing is left of that.
--
-- KEYS[1]  set of the DIDs of the worker
-- KEYS[2]  set of the workers that were stopped, see heartbeat.lua
-- ARGV[1]  what all keys begin with
-- ARGV[2]  instance of its node
-- ARGV[3]  number of the worker
-- ARGV[4]  how many at most: Redis does nothing else meanwhile
--
-- Returns how many are left to look at.

redis.call('SREM', KEYS[2], ARGV[2] .. ':' .. ARGV[3])
local dids = redis.call('SPOP', KEYS[1], ARGV[4])
for _, did in ipairs(dids) do
    local agent = ARGV[1] .. 'agent:' .. did
    local old = redis.call('HMGET', agent, 'i', 'w', 'x', 'h', 'k')
    if old[1] == ARGV[2] and old[2] == ARGV[3] then
        redis.call('DEL', agent)
        redis.call('PUBLISH', ARGV[1] .. 'presence',
                   'leave\n' .. did .. '\noffline\n' .. old[4] .. '\n\n' .. #old[5] .. '\n' .. old[5])
        for _, term in ipairs(cjson.decode(old[3])) do
            redis.call('ZREM', ARGV[1] .. term, did)
        end
    end
end
return redis.call('SCARD', KEYS[1])
