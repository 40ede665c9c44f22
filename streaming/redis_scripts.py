"""What Redis does in one step, in Lua.

A room has a hash (epoch, top, run, bytes) and a stream whose ids are `<offset>-0`; a generation has
a hash (who makes it, what it is, its top, who ended it) and a stream whose entries hold what one
flush brought, under the offset of its last event. Each key's name has its room or generation in
braces, so that a cluster keeps them on one node.

What takes memory comes first: where none is left Redis refuses a script at its first write, and one
that has written something may go on.
"""

from __future__ import annotations

from streaming.redis_node import Script

# The life of a room: another begins where its hash or stream is missing, they disagree, or the data
# have been through another start of Redis or another server, which may have taken offsets back. In
# the last case what is there stays there.
_LIFE = """
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'top', 'run', 'bytes')
local epoch, top, bytes = meta[1], tonumber(meta[2] or 0), tonumber(meta[4] or 0)
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
local whole = epoch and (last and last[1] or '0-0') == top .. '-0'
if not whole or meta[3] ~= run then
  epoch, top, bytes = ARGV[1], whole and top or 0, whole and bytes or 0
  redis.call('HSET', KEYS[1], 'epoch', epoch, 'top', top, 'run', run, 'bytes', bytes)
  if not whole then redis.call('DEL', KEYS[2]) end
end
"""

# KEYS: hash, stream. ARGV: an epoch in case one begins; milliseconds that the room is kept; the
# epoch and offset known already. Returns epoch, top, and the entries after what is known.
LOOK = Script(
    _LIFE
    + """
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
local after = epoch == ARGV[3] and tonumber(ARGV[4]) or 0
return {epoch, top, redis.call('XRANGE', KEYS[2], (after + 1) .. '-0', '+')}
"""
)

# KEYS: hash, stream, what idempotency keys have done, these keys in order. ARGV: as of LOOK the
# first two; the key; digest; how many keys, events and bytes the room keeps; channel; "there" if
# the room must be there, or ""; the events. Returns epoch and first offset, or what the key did:
# digest, epoch, first offset, with spaces; or nothing where there is no room.
PUBLISH = Script(
    """
local done = redis.call('HGET', KEYS[3], ARGV[3])
if done then return {done} end
if ARGV[9] ~= '' and redis.call('EXISTS', KEYS[1]) == 0 then return {} end
"""
    + _LIFE
    + """
local first, told = top + 1, {}
for i = 10, #ARGV do
  top = top + 1
  bytes = bytes + #ARGV[i]
  redis.call('XADD', KEYS[2], top .. '-0', 'e', ARGV[i])
  told[#told + 1] = ARGV[i]
end
local most = tonumber(ARGV[7])
local held = redis.call('XLEN', KEYS[2])
while held > 1 and (held > tonumber(ARGV[6]) or bytes > most) do
  local oldest = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
  bytes = bytes - #oldest[2][2]
  redis.call('XDEL', KEYS[2], oldest[1])
  held = held - 1
end
redis.call('HSET', KEYS[1], 'top', top, 'bytes', bytes)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
redis.call('HSET', KEYS[3], ARGV[3], ARGV[4] .. ' ' .. epoch .. ' ' .. first)
if redis.call('RPUSH', KEYS[4], ARGV[3]) > tonumber(ARGV[5]) then
  redis.call('HDEL', KEYS[3], redis.call('LPOP', KEYS[4]))
end
redis.call('PEXPIRE', KEYS[3], ARGV[2])
redis.call('PEXPIRE', KEYS[4], ARGV[2])
redis.call('PUBLISH', ARGV[8], epoch .. ' ' .. first .. ' [' .. table.concat(told, ',') .. ']')
return {epoch, first}
"""
)

# KEYS: all that is kept of a room. ARGV: channel; what to say there. At once, so that nobody begins
# the room anew before those who are in it know.
DELETE = Script("redis.call('DEL', unpack(KEYS)) redis.call('PUBLISH', ARGV[1], ARGV[2])")

# KEYS: hash, stream. ARGV: channel; who makes it; milliseconds that it is kept; first and last
# offset of these events; the events; the ending's type, or "". Returns "ok", "lost" where nothing
# is known of it, the offset after which to go on, or below 0 that of the end which another has put.
MIRROR = Script(
    """
local meta = redis.call('HMGET', KEYS[1], 'maker', 'top', 'ended')
if not meta[1] then return 'lost' end
local top, first, last = tonumber(meta[2]), tonumber(ARGV[4]), tonumber(ARGV[5])
if meta[3] and meta[3] ~= ARGV[2] then return -top end
if top >= last then return 'ok' end
if top + 1 ~= first then return top end
redis.call('XADD', KEYS[2], last .. '-0', 'e', ARGV[6])
redis.call('HSET', KEYS[1], 'top', last)
if ARGV[7] ~= '' then redis.call('HSET', KEYS[1], 'ended', ARGV[2]) end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('PUBLISH', ARGV[1], first .. ' ' .. ARGV[6])
return 'ok'
"""
)

# Ends a generation whose maker is lost, far above all that the maker may have said. KEYS: hash,
# stream. ARGV: channel; who ends it; how far above; the ending. Returns the ending's offset where
# this call did it, 0 where another has, -1 where nothing is known of it.
END = Script(
    """
local meta = redis.call('HMGET', KEYS[1], 'maker', 'top', 'ended')
if not meta[1] then return -1 end
if meta[3] then return meta[3] == ARGV[2] and tonumber(meta[2]) or 0 end
local offset = tonumber(meta[2]) + tonumber(ARGV[3])
redis.call('XADD', KEYS[2], offset .. '-0', 'e', ARGV[4])
redis.call('HSET', KEYS[1], 'top', offset, 'ended', ARGV[2])
local left = redis.call('PTTL', KEYS[1])
if left > 0 then redis.call('PEXPIRE', KEYS[2], left) end
redis.call('PUBLISH', ARGV[1], offset .. ' ' .. ARGV[4])
return offset
"""
)

# Takes an idempotency key for a generation. KEYS: the key. ARGV: what it is to hold; what it may
# hold besides, being of no worth; milliseconds. Returns what another has put there, or nil.
CLAIM = Script(
    """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] and held ~= ARGV[2] then return held end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return false
"""
)

# Frees an idempotency key. KEYS: the key. ARGV: what it holds if it is ours.
FREE = Script("if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end")

# Puts a value in another's place. KEYS: the key. ARGV: the other; the value; milliseconds. Returns
# 1 where the value is there, also by this call's first attempt, else 0.
SWAP = Script(
    """
local held = redis.call('GET', KEYS[1])
if held ~= ARGV[1] and held ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""
)

# Counts one in a window that begins with its first. KEYS: the count. ARGV: the window's
# milliseconds. Returns the count, and the milliseconds that are left of the window.
HIT = Script(
    """
local count = redis.call('INCR', KEYS[1])
if count == 1 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return {count, redis.call('PTTL', KEYS[1])}
"""
)
