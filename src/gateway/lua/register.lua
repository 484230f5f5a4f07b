-- Make a session the one of its DID, and return the one that it replaces.
--
-- KEYS[1]  the agent: hash; n number of its node, i instance of the node, w worker, c connection, e epoch,
--          p when it was proven, in ms, s status, k card, h 1 if hidden, x index terms (JSON list), t text to search,
--          q numbers of the nodes that asked where it is, each followed by a comma
-- KEYS[2]  set of the DIDs of the worker that registers it
-- ARGV[1]  what all keys begin with
-- ARGV[2]  key of the DID: what follows did:key:z6Mk
-- ARGV[3]  n   ARGV[4]  i   ARGV[5]  w   ARGV[6]  c   ARGV[7]  e
-- ARGV[8]  p: timestamp of the agent's REGISTER in ms. Only ever compared with others of the same agent.
-- ARGV[9]  s   ARGV[10] k, may be empty   ARGV[11] x
-- ARGV[12] "new": it has proven itself just now, and replaces whatever is there.
--          "again": a node announces what it has had; one that was proven later stays.
-- ARGV[13] time of Redis in ms after which a new one is too late: the agent has gone elsewhere meanwhile
-- ARGV[14] h   ARGV[15] t
--
-- Whoever watches hears of it: event, key of the DID, status, h as it was (nothing if the agent was not there),
-- h as it is (nothing if it is not there any more) and the size of the card as it was, each followed by a line
-- feed; then that card, and the card as it is. If both cards are the same, it comes once, and the size is "=".
--
-- Returns {"late"}, {"kept", n, w, c, e} or {"done", n, w, c, e, q} with what was there before; n is 0 if
-- nothing was.

local now = redis.call('TIME')
if ARGV[12] == 'new' and now[1] * 1000 + now[2] / 1000 > tonumber(ARGV[13]) then
    return {'late'}
end
local old = redis.call('HMGET', KEYS[1], 'n', 'w', 'c', 'e', 'p', 'x', 'q', 'i', 's', 'k', 'h')
local place = {old[1] or '0', old[2] or '0', old[3] or '0', old[4] or '0'}
if ARGV[12] == 'again' and old[4] and old[4] ~= ARGV[7] and tonumber(old[5]) > tonumber(ARGV[8]) then
    return {'kept', place[1], place[2], place[3], place[4]}
end
if old[8] then
    redis.call('SREM', ARGV[1] .. 'owned:' .. old[8] .. ':' .. old[2], ARGV[2])
end
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('HSET', KEYS[1], 'n', ARGV[3], 'i', ARGV[4], 'w', ARGV[5], 'c', ARGV[6], 'e', ARGV[7], 'p', ARGV[8],
           's', ARGV[9], 'k', ARGV[10], 'h', ARGV[14], 'x', ARGV[11],
           't', ARGV[15])
if old[6] ~= ARGV[11] then
    if old[6] then
        for _, term in ipairs(cjson.decode(old[6])) do
            redis.call('ZREM', ARGV[1] .. term, ARGV[2])
        end
    end
    for _, term in ipairs(cjson.decode(ARGV[11])) do
        redis.call('ZADD', ARGV[1] .. term, 0, ARGV[2])
    end
end
if old[4] ~= ARGV[7] or old[9] ~= ARGV[9] or old[10] ~= ARGV[10] or old[11] ~= ARGV[14] then
    local event = ARGV[9] == 'away' and 'away' or old[4] and 'update' or 'join'
    local cards = '=\n' .. ARGV[10]
    if old[10] ~= ARGV[10] then
        cards = #(old[10] or '') .. '\n' .. (old[10] or '') .. ARGV[10]
    end
    redis.call('PUBLISH', ARGV[1] .. 'presence', event .. '\n' .. ARGV[2] .. '\n' .. ARGV[9] .. '\n' ..
               (old[11] or '') .. '\n' .. ARGV[14] .. '\n' .. cards)
end
return {'done', place[1], place[2], place[3], place[4], old[7] or ''}
