-- Remove a node whose lease has ended and of which nothing is left.
--
-- KEYS[1]  nodes, see heartbeat.lua
-- KEYS[2]  its lease
-- ARGV[1]  its number
-- ARGV[2]  its instance

local node = redis.call('HGET', KEYS[1], ARGV[1])
if node and string.match(node, '^%S+') == ARGV[2] and redis.call('EXISTS', KEYS[2]) == 0 then
    redis.call('HDEL', KEYS[1], ARGV[1])
end
return redis.status_reply('OK')
