-- Say that a worker ends because it was stopped.
--
-- KEYS[1]  set of the workers that have ended so, see heartbeat.lua
-- ARGV[1]  instance of its node
-- ARGV[2]  number of the worker

redis.call('SADD', KEYS[1], ARGV[1] .. ':' .. ARGV[2])
return redis.status_reply('OK')
