-- Return what the registry has of some agents, listed or not.
--
-- ARGV[1]   what all keys begin with
-- ARGV[2..] keys of the DIDs
--
-- Returns {key, status, card, key, ...}.

local found = {}
for i = 2, #ARGV do
    local agent = redis.call('HMGET', ARGV[1] .. 'agent:' .. ARGV[i], 's', 'k')
    if agent[1] then
        found[#found + 1] = ARGV[i]
        found[#found + 1] = agent[1]
        found[#found + 1] = agent[2]
    end
end
return found
