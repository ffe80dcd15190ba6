"""The Lua scripts that Redis runs: leases with fencing tokens, epochs, the registry of workers, holders of prefixes.

A script runs alone in the server, so each of these is one atomic step. Numbers handed out (tokens, epochs) are
microseconds since 1970 or one more than the last, whichever is larger. The server needs longer than a microsecond for one
script, so the chain of "one more" never outruns the clock, and a server that lost its data (FLUSHALL) or was set back to an
old snapshot still hands out larger numbers than before. The caller sends its own clock too, for a server whose clock is behind.

Entries may have been damaged or written by something else: a key of the wrong type or a value that is not a number reads
as missing and is overwritten.

Source: own design; fencing tokens as in M. Kleppmann, "How to do distributed locking" (2016).
"""

from __future__ import annotations

# Numbers go back as text: Lua's doubles hold microseconds exactly (below 2^53) but would print them as 1.8e+15.
_PRELUDE = """
local function text(n) return string.format('%.0f', n) end
local function now_us() local t = redis.call('TIME'); return t[1] * 1000000 + t[2] end
local function number_at(key)
  local value = redis.pcall('GET', key)
  if type(value) ~= 'string' then return 0 end
  return tonumber(value) or 0
end
local function next_number(key, caller_us)
  return math.max(number_at(key) + 1, now_us(), tonumber(caller_us))
end
local function hash_field(key, name)
  local value = redis.pcall('HGET', key, name)
  if type(value) ~= 'string' then return nil end
  return value
end
local function ensure_type(key, wanted)
  local found = redis.call('TYPE', key)['ok']
  if found ~= wanted and found ~= 'none' then redis.call('DEL', key) end
end
"""

# KEYS: epoch counter. ARGV: caller's clock in µs. Returns the new epoch.
NEXT_EPOCH = (
    _PRELUDE
    + """
local epoch = next_number(KEYS[1], ARGV[1])
redis.call('SET', KEYS[1], text(epoch))
return text(epoch)
"""
)

# KEYS: epoch counter, worker entry, ordered set of workers. ARGV: worker id, epoch, entry, ttl in ms.
# Returns 1, or 0 when a newer epoch is known. The counter outlives the entry, so a worker that was paused past its time to
# live cannot come back under its old epoch.
REGISTER = (
    _PRELUDE
    + """
local epoch = tonumber(ARGV[2])
local newest = number_at(KEYS[1])
if newest > epoch then return 0 end
if newest < epoch then redis.call('SET', KEYS[1], ARGV[2]) end
redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[4])
ensure_type(KEYS[3], 'zset')
redis.call('ZADD', KEYS[3], text(now_us() + tonumber(ARGV[4]) * 1000), ARGV[1])
return 1
"""
)

# KEYS: epoch counter, worker entry, ordered set. ARGV: worker id, epoch. A newer epoch's entry is left alone.
UNREGISTER = (
    _PRELUDE
    + """
if number_at(KEYS[1]) > tonumber(ARGV[2]) then return 0 end
ensure_type(KEYS[3], 'zset')
redis.call('ZREM', KEYS[3], ARGV[1])
return redis.call('DEL', KEYS[2])
"""
)

# KEYS: ordered set. Returns the ids that are not expired, and forgets the others.
LIVE_WORKERS = (
    _PRELUDE
    + """
ensure_type(KEYS[1], 'zset')
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', text(now_us()))
return redis.call('ZRANGE', KEYS[1], 0, -1)
"""
)

# KEYS: holders of one prefix. ARGV: worker id, epoch, tokens, ttl in ms. Field value: "epoch tokens expiry_us".
ADD_HOLDER = (
    _PRELUDE
    + """
ensure_type(KEYS[1], 'hash')
local known = hash_field(KEYS[1], ARGV[1])
local epoch = known and tonumber(string.match(known, '^%d+')) or 0
if epoch > tonumber(ARGV[2]) then return 0 end
local expiry = now_us() + tonumber(ARGV[4]) * 1000
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. ARGV[3] .. ' ' .. text(expiry))
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[4]) then redis.call('PEXPIRE', KEYS[1], ARGV[4]) end
return 1
"""
)

# KEYS: one per prefix. Returns per key a flat list worker, "epoch tokens expiry_us", ... without the expired.
HOLDERS = (
    _PRELUDE
    + """
local answer = {}
local now = now_us()
for i, key in ipairs(KEYS) do
  local entry = redis.pcall('HGETALL', key)
  local live = {}
  if type(entry) == 'table' and not entry['err'] then
    for j = 1, #entry, 2 do
      local expiry = tonumber(string.match(entry[j + 1], ' (%d+)$') or '0')
      if expiry == 0 or expiry > now then
        live[#live + 1] = entry[j]
        live[#live + 1] = entry[j + 1]
      end
    end
  end
  answer[i] = live
end
return answer
"""
)

# KEYS: lease, fence counter. ARGV: holder, ttl in ms, caller's clock in µs, life of the counter in ms.
# Returns the token, or nothing while another holder's lease lives. The same holder gets a new token: its old one is void.
ACQUIRE_LEASE = (
    _PRELUDE
    + """
local holder = hash_field(KEYS[1], 'holder')
if holder and holder ~= ARGV[1] and redis.call('PTTL', KEYS[1]) > 0 then return false end
local last = tonumber(hash_field(KEYS[1], 'token') or '0') or 0
local token = math.max(next_number(KEYS[2], ARGV[3]), last + 1)
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'token', text(token))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], text(token), 'PX', ARGV[4])
return text(token)
"""
)

# KEYS: lease. ARGV: holder, token, ttl in ms. Never revives a lease that ran out.
RENEW_LEASE = (
    _PRELUDE
    + """
if hash_field(KEYS[1], 'holder') ~= ARGV[1] or hash_field(KEYS[1], 'token') ~= ARGV[2] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""
)

# KEYS: lease. ARGV: holder, token.
RELEASE_LEASE = (
    _PRELUDE
    + """
if hash_field(KEYS[1], 'holder') ~= ARGV[1] or hash_field(KEYS[1], 'token') ~= ARGV[2] then return 0 end
return redis.call('DEL', KEYS[1])
"""
)
