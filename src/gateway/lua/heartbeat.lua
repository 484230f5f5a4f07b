-- Join the nodes, or renew the lease of one that has joined; and say who else is there.
--
-- KEYS[1]  nodes: hash, number of a node -> "instance term workers did name"
-- KEYS[2]  counter of terms
-- KEYS[3]  lease of this node
-- KEYS[4]  set of the DIDs of the worker that asks
-- KEYS[5]  set of the workers that were stopped, "instance:worker", until what they owned is purged
-- ARGV[1]  instance: random, new at every start of a node
-- ARGV[2]  workers of the node
-- ARGV[3]  its DID and its name, for people
-- ARGV[4]  life of the lease in ms
-- ARGV[5]  what the names of all leases begin with
--
-- Returns {number, term, time, owned, nodes}. The number is the smallest that is free, from 1. The term grows
-- with every joining: who finds another one than before was forgotten meanwhile, and announces its agents
-- again. `time` is that of Redis in ms, `owned` the size of KEYS[4], `nodes` a list of
-- {number, instance, workers, DID and name, 1 if its lease holds, 1 if all its workers were stopped}.

local nodes = redis.call('HGETALL', KEYS[1])
local mine, term
local taken, is_there = {}, {}
for i = 1, #nodes, 2 do
    taken[tonumber(nodes[i])] = true
    local instance, its_term = string.match(nodes[i + 1], '^(%S+) (%d+) ')
    is_there[instance] = true
    if instance == ARGV[1] then
        mine, term = tonumber(nodes[i]), tonumber(its_term)
    end
end
-- Without its lease, others may have begun to remove what it owned.
if not mine or redis.call('EXISTS', KEYS[3]) == 0 then
    if not mine then
        mine = 1
        while taken[mine] do
            mine = mine + 1
        end
    end
    term = redis.call('INCR', KEYS[2])
    redis.call('HSET', KEYS[1], mine, ARGV[1] .. ' ' .. term .. ' ' .. ARGV[2] .. ' ' .. ARGV[3])
    nodes = redis.call('HGETALL', KEYS[1])
end
redis.call('SET', KEYS[3], mine, 'PX', ARGV[4])
local stopped = {}
for _, worker in ipairs(redis.call('SMEMBERS', KEYS[5])) do
    local instance = string.match(worker, '^(.*):')
    if is_there[instance] then
        stopped[instance] = (stopped[instance] or 0) + 1
    else -- it was buried before it said this, or by a gateway that does not know of this set
        redis.call('SREM', KEYS[5], worker)
    end
end
local list = {}
for i = 1, #nodes, 2 do
    local instance, _, workers, name = string.match(nodes[i + 1], '^(%S+) (%d+) (%d+) (.*)$')
    list[#list + 1] = {tonumber(nodes[i]), instance, tonumber(workers), name,
                       redis.call('EXISTS', ARGV[5] .. instance), stopped[instance] == tonumber(workers) and 1 or 0}
end
local now = redis.call('TIME')
return {mine, term, now[1] * 1000 + math.floor(now[2] / 1000), redis.call('SCARD', KEYS[4]), list}
