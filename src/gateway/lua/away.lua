-- Say whether an agent is online or away, if the session still owns it.
--
-- KEYS[1]  the agent, see register.lua
-- ARGV[1]  epoch of the session
-- ARGV[2]  its status

if redis.call('HGET', KEYS[1], 'e') == ARGV[1] then
    redis.call('HSET', KEYS[1], 's', ARGV[2])
end
return redis.status_reply('OK')
