-- Remove agents that a worker no longer has, as it finds after it was cut off from Redis.
--
-- KEYS[1]   set of the DIDs of the worker
-- ARGV[1]   what all keys begin with
-- ARGV[2]   instance of its node
-- ARGV[3]   number of the worker
-- ARGV[4..] keys of the DIDs

for i = 4, #ARGV do
    local agent = ARGV[1] .. 'agent:' .. ARGV[i]
    local old = redis.call('HMGET', agent, 'i', 'w', 'x', 'h', 'k')
    if old[1] == ARGV[2] and old[2] == ARGV[3] then
        redis.call('DEL', agent)
        redis.call('PUBLISH', ARGV[1] .. 'presence',
                   'leave\n' .. ARGV[i] .. '\noffline\n' .. old[4] .. '\n\n' .. #old[5] .. '\n' .. old[5])
        for _, term in ipairs(cjson.decode(old[3])) do
            redis.call('ZREM', ARGV[1] .. term, ARGV[i])
        end
    end
    redis.call('SREM', KEYS[1], ARGV[i])
end
return redis.status_reply('OK')
