-- Return some of the listed agents behind a cursor, in the order of their DIDs.
--
-- KEYS[1]  index: sorted set of keys of DIDs, all with the same score
-- ARGV[1]  what all keys begin with
-- ARGV[2]  key of the DID behind which to begin; may be empty
-- ARGV[3]  how many agents at most
-- ARGV[4]  part of the text to search, see register.lua; may be empty
-- ARGV[5]  how many to look at: Redis does nothing else meanwhile
--
-- Returns {cursor, key, status, card, key, ...}; the cursor is empty if nothing is behind.

local from = ARGV[2] == '' and '-' or '(' .. ARGV[2]
local dids = redis.call('ZRANGEBYLEX', KEYS[1], from, '+', 'LIMIT', 0, ARGV[5])
local limit = tonumber(ARGV[3])
local found = {''}
local count = 0
for i, did in ipairs(dids) do
    local agent = redis.call('HMGET', ARGV[1] .. 'agent:' .. did, 's', 'k', 't')
    if agent[1] and (ARGV[4] == '' or string.find(agent[3], ARGV[4], 1, true)) then
        if count == limit then
            found[1] = dids[i - 1]
            return found
        end
        count = count + 1
        found[#found + 1] = did
        found[#found + 1] = agent[1]
        found[#found + 1] = agent[2]
    end
end
if #dids == tonumber(ARGV[5]) then
    found[1] = dids[#dids]
end
return found
