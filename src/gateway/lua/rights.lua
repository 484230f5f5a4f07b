-- Try all commands of the other scripts, with a key that nothing else uses.
--
-- KEYS[1]  the key; afterwards it is not there
-- ARGV[1]  a channel; nobody listens to it
--
-- Returns {command, what Redis says} of the first one that is refused; nil if none is.

local key = KEYS[1]
local tried = {
    {'SET', key, '1', 'PX', '1000'}, {'INCR', key}, {'EXISTS', key}, {'DEL', key},
    {'HSET', key, 'field', '1'}, {'HGET', key, 'field'}, {'HMGET', key, 'field'}, {'HGETALL', key},
    {'HDEL', key, 'field'},
    {'SADD', key, '1', '2'}, {'SCARD', key}, {'SMEMBERS', key}, {'SREM', key, '1'}, {'SPOP', key},
    {'ZADD', key, '0', '1'}, {'ZRANGEBYLEX', key, '-', '+'}, {'ZREM', key, '1'},
    {'PUBLISH', ARGV[1], ''}, {'TIME'},
}
for _, command in ipairs(tried) do
    local answer = redis.pcall(unpack(command))
    if type(answer) == 'table' and answer.err then
        redis.pcall('DEL', key)
        return {command[1], answer.err}
    end
end
return false
