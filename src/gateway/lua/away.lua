-- Say that an agent is away, if the session still owns it.
--
-- KEYS[1]  the agent, see register.lua
-- ARGV[1]  what all keys begin with
-- ARGV[2]  key of the DID
-- ARGV[3]  epoch of the session

local old = redis.call('HMGET', KEYS[1], 'e', 'h', 'k')
if old[1] == ARGV[3] then
    redis.call('HSET', KEYS[1], 's', 'away')
    redis.call('PUBLISH', ARGV[1] .. 'presence',
               'away\n' .. ARGV[2] .. '\naway\n' .. old[2] .. '\n' .. old[2] .. '\n=\n' .. old[3])
end
return redis.status_reply('OK')
