"""What runs inside Valkey: one Lua script a method, so that each is atomic.

Every script has KEYS[1], the epoch's name, from which all other names follow: they share its hash
tag and so one slot of a cluster. ARGV[1] is the epoch that is expected, ARGV[2] arguments in JSON;
ARGV[3] and on are bytes. Numbers are doubles: whole up to `base.AMOUNT_MAX`, and written with %.0f.

Names behind the prefix:

  epoch, version, moves           the id of the books; of the keys' last change; ends and resolves
  heard, ended                    zset: process → when
  rows:PROCESS                    hash: [day,key,session,ladder,rung,month] → seven totals
  said:PROCESS                    the number of the last exchange
  lease:METER:WINDOW:OWNER        hash: process (or "", the ended) → granted,spent,counted,number
  of:PROCESS                      zset: lease → when it is forgotten
  used:DAY:KEY, keysof:DAY        hash: [session,ladder,rung,month] → totals of ended ones; keys
  doubts                          set: DAY:KEY with something in doubt
  key, digest, parent             hash: name → record; digest → name; session → key
  changed, names, sessions, ends  zset: by version; by name; sessions by name; sessions by end
  answer:ID, answers, answers:KEY hash of one; zset of the finished ones by age, all and by key
  cache:KEY, cache, group:GROUP   hash of one; zset of all by age; set of a group's
  sizes, sums, turns              hash: entry → bytes; sum of bytes; the counter that age goes by
"""

from __future__ import annotations

from router.store import terms

_COMMON = (
    """
local P = string.sub(KEYS[1], 1, -6)
local epoch = redis.call('GET', KEYS[1]) or ''
if epoch ~= ARGV[1] then return redis.error_reply('STATELOST ' .. epoch) end
local A = cjson.decode(ARGV[2])
local now = A.now
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1000000
end
"""
    f"local MARGIN, USAGE_KEPT = {terms.MARGIN_S}, {terms.USAGE_KEPT_S}"
)

_LEDGER = """
local function silent(heard)
  return heard > now + MARGIN or now - heard > A.lease_s + MARGIN
end

local function live_set()
  local live, count = {}, 0
  for _, process in ipairs(redis.call('ZRANGEBYSCORE', P .. 'heard',
      now - A.lease_s - MARGIN, now + MARGIN)) do
    live[process] = true
    count = count + 1
  end
  return live, count
end

local function silent_ones()
  local live, found = live_set(), {}
  for _, process in ipairs(redis.call('ZRANGE', P .. 'heard', 0, -1)) do
    if not live[process] then table.insert(found, process) end
  end
  return found
end

local function lease(text)
  if not text then return 0, 0, 0, 0 end
  local g, s, c, n = string.match(text, '^(%d+),(%d+),(%d+),(%d+)$')
  return tonumber(g), tonumber(s), tonumber(c), tonumber(n)
end

local function keep(process, id, forgotten_at, granted, spent, counted, number)
  redis.call('HSET', P .. 'lease:' .. id, process,
    string.format('%.0f,%.0f,%.0f,%.0f', granted, spent, counted, number))
  if forgotten_at > 0 then redis.call('EXPIREAT', P .. 'lease:' .. id, forgotten_at) end
  if process ~= '' then
    redis.call('ZADD', P .. 'of:' .. process, forgotten_at > 0 and forgotten_at or 'inf', id)
  end
end

local function count(process, id, forgotten_at, amount)
  local granted, spent, counted, number = lease(redis.call('HGET', P .. 'lease:' .. id, process))
  counted = counted + amount
  spent = math.max(spent, counted)
  keep(process, id, forgotten_at, math.max(granted, spent), spent, counted, number)
end

local function totals(text)
  local found = {}
  if not text then return {0, 0, 0, 0, 0, 0, 0} end
  for number in string.gmatch(text, '%d+') do table.insert(found, tonumber(number)) end
  return found
end

local function written(numbers)
  return string.format('%.0f,%.0f,%.0f,%.0f,%.0f,%.0f,%.0f', unpack(numbers))
end

-- A row: its name, its totals, and the accounts that it counts in: id, when forgotten, and of what.
local function report(process, rows)
  for _, row in ipairs(rows) do
    local known = totals(redis.call('HGET', P .. 'rows:' .. process, row[1]))
    local delta = {}
    local grew = false
    for place = 1, 7 do
      delta[place] = math.max(0, row[2][place] - known[place])
      known[place] = known[place] + delta[place]
      grew = grew or delta[place] > 0
    end
    if grew then
      redis.call('HSET', P .. 'rows:' .. process, row[1], written(known))
      for _, account in ipairs(row[3]) do
        local amount = delta[4] + delta[7]
        if account[3] == 'tokens' then amount = delta[2] + delta[3] end
        if amount > 0 then count(process, account[1], account[2], amount) end
      end
    end
  end
end
"""

# Mirrors core.leases.grant; tests hold both equal. fmod is exact where Lua's % is not.
_GRANT = """
local function grant(ask, granted, spent, number, others, live)
  if ask.number <= number then return granted, spent, number end
  spent = math.max(spent, ask.spent)
  local floor = math.max(ask.floor, spent)
  granted = math.max(granted, floor)
  if not ask.keep and ask.need == 0 then return floor, spent, ask.number end
  local free = math.max(0, ask.limit - others - granted)
  local parts = 4 * math.max(1, live)
  local block = (free - math.fmod(free, parts)) / parts
  local wanted = math.max(0, floor + ask.need - granted)
  return granted + math.min(free, math.max(wanted, block)), spent, ask.number
end
"""

SYNC = (
    _COMMON
    + _LEDGER
    + _GRANT
    + """
if redis.call('ZSCORE', P .. 'ended', A.process) then return redis.error_reply('STATEENDED') end
local heard = redis.call('ZSCORE', P .. 'heard', A.process)
local of = P .. 'of:' .. A.process
redis.call('ZADD', P .. 'heard', now, A.process)
if heard and silent(tonumber(heard)) then
  -- Others may have its places by now.
  for _, id in ipairs(redis.call('ZRANGE', of, 0, -1)) do
    if string.sub(id, 1, 11) == 'concurrent:' then
      local _, spent, counted, number = lease(redis.call('HGET', P .. 'lease:' .. id, A.process))
      keep(A.process, id, 0, 0, spent, counted, number)
    end
  end
end
redis.call('ZREMRANGEBYSCORE', of, 0, now)
local said = tonumber(redis.call('GET', P .. 'said:' .. A.process) or 0)
if A.turn > said then redis.call('SET', P .. 'said:' .. A.process, A.turn) end
report(A.process, A.rows)
local live, live_count = live_set()
local answer = {live_count, tonumber(redis.call('GET', P .. 'version') or 0), said}
for _, ask in ipairs(A.asks) do
  local granted, spent, counted, number = 0, 0, 0, 0
  local others, settled = 0, 0
  local fields = redis.call('HGETALL', P .. 'lease:' .. ask.id)
  for place = 1, #fields, 2 do
    local g, s, c, n = lease(fields[place + 1])
    if fields[place] == A.process then
      granted, spent, counted, number = g, s, c, n
    else
      settled = settled + s
      if not ask.places or live[fields[place]] then others = others + g end
    end
  end
  if ask.number > number then
    granted, spent, number = grant(ask, granted, spent, number, others, live_count)
    keep(A.process, ask.id, ask.forgotten_at, granted, spent, counted, number)
  end
  table.insert(answer, granted)
  table.insert(answer, settled + spent)
  table.insert(answer, math.max(0, ask.limit - others - granted))
end
return answer
"""
)

# Decides one ask outside of any books, for the test that compares it with core.leases.grant.
GRANT_ALONE = (
    _COMMON
    + _GRANT
    + """
local granted, spent, number =
  grant(A.ask, A.row[1], A.row[2], A.row[3], A.others, A.live)
return {granted, spent, number}
"""
)

END_REPORT = (
    _COMMON
    + _LEDGER
    + """
if redis.call('ZSCORE', P .. 'ended', A.process) then return 0 end
report(A.process, A.rows)
if A.is_last then
  -- From now on its id is used up, whatever becomes of the rest.
  redis.call('ZREM', P .. 'heard', A.process)
  redis.call('ZADD', P .. 'ended', now, A.process)
  redis.call('ZREMRANGEBYSCORE', P .. 'ended', 0, now - USAGE_KEPT)
  redis.call('INCR', P .. 'moves')
end
return 0
"""
)

END_LEASES = (
    _COMMON
    + _LEDGER
    + """
local of = redis.call('ZRANGE', P .. 'of:' .. A.process, 0, A.limit - 1, 'WITHSCORES')
for place = 1, #of, 2 do
  local id = of[place]
  local text = redis.call('HGET', P .. 'lease:' .. id, A.process)
  if text then
    local granted, _, counted = lease(text)
    local meter = string.match(id, '^([%w_]+):')
    local left = counted
    if meter == 'concurrent' then left = 0 end
    if meter == 'tokens_per_minute' or meter == 'requests_per_minute' then left = granted end
    local forgotten_at = of[place + 1] == 'inf' and 0 or tonumber(of[place + 1])
    if left > 0 then count('', id, forgotten_at, left) end
    redis.call('HDEL', P .. 'lease:' .. id, A.process)
  end
  redis.call('ZREM', P .. 'of:' .. A.process, id)
end
return #of
"""
)

END_USAGE = (
    _COMMON
    + _LEDGER
    + """
local from = P .. 'rows:' .. A.process
local rows = redis.call('HRANDFIELD', from, A.limit, 'WITHVALUES')
for place = 1, #rows, 2 do
  local row, more = cjson.decode(rows[place]), totals(rows[place + 1])
  local day, key = string.format('%.0f', row[1]), row[2]
  local until_s = row[1] + USAGE_KEPT
  if until_s > now then
    -- The session is of use only while its doubts may have to be taken back from its budget.
    local field = {'', row[4], row[5], 0}
    if more[7] > 0 then
      field = {row[3], row[4], row[5], row[6]}
      redis.call('SADD', P .. 'doubts', day .. ':' .. key)
    end
    field = cjson.encode(field)
    local used = P .. 'used:' .. day .. ':' .. key
    local sum = totals(redis.call('HGET', used, field))
    for column = 1, 7 do sum[column] = sum[column] + more[column] end
    redis.call('HSET', used, field, written(sum))
    redis.call('EXPIREAT', used, until_s)
    redis.call('SADD', P .. 'keysof:' .. day, key)
    redis.call('EXPIREAT', P .. 'keysof:' .. day, until_s)
  end
  redis.call('HDEL', from, rows[place])
end
redis.call('DEL', P .. 'said:' .. A.process)
redis.call('INCR', P .. 'moves')
return #rows
"""
)

SILENT = (
    _COMMON
    + _LEDGER
    + """
local found = {}
for _, process in ipairs(silent_ones()) do
  for _, id in ipairs(redis.call('ZRANGE', P .. 'of:' .. process, 0, -1)) do
    local granted, spent = lease(redis.call('HGET', P .. 'lease:' .. id, process))
    if granted > spent then
      local meter, owner = string.match(id, '^([%w_]+):%d+:(.*)$')
      owner = redis.call('HGET', P .. 'parent', owner) or owner
      table.insert(found, {process, owner, meter, granted - spent})
    end
  end
end
return found
"""
)

RESOLVE = (
    _COMMON
    + _LEDGER
    + """
for _, process in ipairs(silent_ones()) do
  for _, id in ipairs(redis.call('ZRANGE', P .. 'of:' .. process, 0, -1)) do
    local owner = string.match(id, '^[%w_]+:%d+:(.*)$')
    local text = redis.call('HGET', P .. 'lease:' .. id, process)
    if text and (not A.key or owner == A.key
        or redis.call('HGET', P .. 'parent', owner) == A.key) then
      local _, spent, counted, number = lease(text)
      redis.call('HSET', P .. 'lease:' .. id, process,
        string.format('%.0f,%.0f,%.0f,%.0f', spent, spent, counted, number))
    end
  end
end
local function take_back(id, amount)
  local text = redis.call('HGET', P .. 'lease:' .. id, '')
  if text then
    local _, _, counted = lease(text)
    counted = math.max(0, counted - amount)
    redis.call('HSET', P .. 'lease:' .. id, '',
      string.format('%.0f,%.0f,%.0f,0', counted, counted, counted))
  end
end
local cleared = 0
for _, place in ipairs(redis.call('SMEMBERS', P .. 'doubts')) do
  local day, key = string.match(place, '^(%d+):(.*)$')
  if not A.key or key == A.key then
    local used = P .. 'used:' .. place
    local fields = redis.call('HGETALL', used)
    for at = 1, #fields, 2 do
      local sum = totals(fields[at + 1])
      local doubt = sum[7]
      if doubt > 0 then
        cleared = cleared + doubt
        sum[7] = 0
        if A.charge then
          sum[4] = sum[4] + doubt
          sum[6] = sum[6] + doubt
        else
          local row = cjson.decode(fields[at])
          take_back('usd_per_day:' .. day .. ':' .. key, doubt)
          take_back(string.format('usd_per_month:%.0f:%s', row[4], key), doubt)
          if row[1] ~= '' then take_back('usd:0:' .. row[1], doubt) end
        end
        redis.call('HSET', used, fields[at], written(sum))
      end
    end
    redis.call('SREM', P .. 'doubts', place)
  end
end
redis.call('INCR', P .. 'moves')
return cleared
"""
)

FIND_KEY = (
    _COMMON
    + """
local name = A.name
if A.digest then name = redis.call('HGET', P .. 'digest', A.digest) end
return name and redis.call('HGET', P .. 'key', name)
"""
)

PUT_KEY = (
    _COMMON
    + """
local known = redis.call('HGET', P .. 'key', A.name)
if known and A.is_new then return known == A.record and 1 or 0 end
if known then
  local old = cjson.decode(known)
  if old.revoked_at ~= cjson.null and not A.is_revoked then return 0 end
  for digest in pairs(old.digests) do redis.call('HDEL', P .. 'digest', digest) end
end
redis.call('HSET', P .. 'key', A.name, A.record)
for _, digest in ipairs(A.digests) do redis.call('HSET', P .. 'digest', digest, A.name) end
redis.call('ZADD', P .. 'changed', redis.call('INCR', P .. 'version'), A.name)
redis.call('ZREM', P .. (A.parent == '' and 'sessions' or 'names'), A.name)
redis.call('ZADD', P .. (A.parent == '' and 'names' or 'sessions'), 0, A.name)
redis.call('ZREM', P .. 'ends', A.name)
redis.call('HDEL', P .. 'parent', A.name)
if A.parent ~= '' then
  redis.call('HSET', P .. 'parent', A.name, A.parent)
  if A.ends_at > 0 then redis.call('ZADD', P .. 'ends', A.ends_at, A.name) end
end
return 1
"""
)

LIST_KEYS = (
    _COMMON
    + """
local names = redis.call('ZRANGEBYLEX', P .. (A.sessions and 'sessions' or 'names'),
  A.after == '' and '-' or '(' .. A.after, '+', 'LIMIT', 0, A.limit)
local found = {}
for _, name in ipairs(names) do table.insert(found, redis.call('HGET', P .. 'key', name)) end
return found
"""
)

CHANGED_KEYS = (
    _COMMON
    + """
local lines = redis.call('ZRANGEBYSCORE', P .. 'changed', '(' .. A.since, '+inf',
  'WITHSCORES', 'LIMIT', 0, A.limit)
local found = {tonumber(redis.call('GET', P .. 'version') or 0)}
if #lines == 2 * A.limit then found[1] = tonumber(lines[#lines]) end
for place = 1, #lines, 2 do table.insert(found, redis.call('HGET', P .. 'key', lines[place])) end
return found
"""
)

FORGET_EXPIRED = (
    _COMMON
    + """
local names = redis.call('ZRANGEBYSCORE', P .. 'ends', 0, '(' .. A.before, 'LIMIT', 0, A.limit)
local processes = redis.call('ZRANGE', P .. 'heard', 0, -1)
for _, name in ipairs(names) do
  local record = cjson.decode(redis.call('HGET', P .. 'key', name))
  for digest in pairs(record.digests) do redis.call('HDEL', P .. 'digest', digest) end
  redis.call('HDEL', P .. 'key', name)
  redis.call('HDEL', P .. 'parent', name)
  for _, index in ipairs({'changed', 'sessions', 'ends'}) do
    redis.call('ZREM', P .. index, name)
  end
  redis.call('DEL', P .. 'lease:usd:0:' .. name)
  for _, process in ipairs(processes) do
    redis.call('ZREM', P .. 'of:' .. process, 'usd:0:' .. name)
  end
end
return #names
"""
)

# --- what may be forgotten ----------------------------------------------------------------------

_KEPT = """
local function grow(sum, size) return redis.call('HINCRBY', P .. 'sums', sum, size) end

local function forget_answer(id)
  local size = tonumber(redis.call('HGET', P .. 'sizes', 'answer:' .. id) or 0)
  local key = string.sub(id, string.find(id, ':', 1, true) + 1)
  key = string.sub(key, 1, tonumber(string.match(id, '^%d+')))
  redis.call('DEL', P .. 'answer:' .. id)
  redis.call('ZREM', P .. 'answers', id)
  redis.call('ZREM', P .. 'answers:' .. key, id)
  if redis.call('HDEL', P .. 'sizes', 'answer:' .. id) == 1 then
    grow('answers', -size)
    if grow('answers:' .. key, -size) <= 0 then
      redis.call('HDEL', P .. 'sums', 'answers:' .. key)
    end
  end
end

local function forget_entry(name)
  local size = tonumber(redis.call('HGET', P .. 'sizes', 'cache:' .. name) or 0)
  local group = redis.call('HGET', P .. 'groups', name)
  redis.call('DEL', P .. 'cache:' .. name)
  redis.call('ZREM', P .. 'cache', name)
  redis.call('HDEL', P .. 'groups', name)
  if group then redis.call('SREM', P .. 'group:' .. group, name) end
  if redis.call('HDEL', P .. 'sizes', 'cache:' .. name) == 1 then grow('cache', -size) end
end

-- What the server let expire still has its place in the sums.
local function forget_expired(index, entry, forget)
  for _, name in ipairs(redis.call('ZRANGE', P .. index, 0, 9)) do
    if redis.call('EXISTS', P .. entry .. name) == 0 then forget(name) end
  end
end

local function oldest(index) return redis.call('ZRANGE', P .. index, 0, 0)[1] end
local function sum(name) return tonumber(redis.call('HGET', P .. 'sums', name) or 0) end
"""

CLAIM_ANSWER = (
    _COMMON
    + _LEDGER
    + _KEPT
    + """
local name = P .. 'answer:' .. A.id
local found = redis.call('HMGET', name, 'fingerprint', 'process', 'body', 'status', 'headers',
  'ends_at', 'claimed_at')
if found[1] and tonumber(found[6]) > now then
  if found[3] then return found end
  if found[2] == A.process then
    if found[1] == A.fingerprint then return false end
    return found
  end
  local heard_at = math.max(tonumber(found[7]),
    tonumber(redis.call('ZSCORE', P .. 'heard', found[2]) or 0))
  if not redis.call('ZSCORE', P .. 'ended', found[2]) and not silent(heard_at) then return found end
end
forget_answer(A.id)
redis.call('HSET', name, 'fingerprint', A.fingerprint, 'process', A.process,
  'ends_at', now + A.ttl_s, 'claimed_at', now)
redis.call('EXPIREAT', name, math.ceil(now + A.ttl_s))
return false
"""
)

KEEP_ANSWER = (
    _COMMON
    + _KEPT
    + """
local name = P .. 'answer:' .. A.id
if redis.call('HGET', name, 'process') ~= A.process then return 0 end
local fingerprint = redis.call('HGET', name, 'fingerprint')
local claimed_at = redis.call('HGET', name, 'claimed_at')
forget_answer(A.id)
if A.size > A.answer_bytes_max then return 0 end
redis.call('HSET', name, 'fingerprint', fingerprint, 'process', A.process, 'body', ARGV[3],
  'status', A.status, 'headers', A.headers, 'ends_at', now + A.ttl_s, 'claimed_at', claimed_at)
redis.call('EXPIREAT', name, math.ceil(now + A.ttl_s))
local turn = redis.call('INCR', P .. 'turns')
redis.call('ZADD', P .. 'answers', turn, A.id)
redis.call('ZADD', P .. 'answers:' .. A.key, turn, A.id)
redis.call('HSET', P .. 'sizes', 'answer:' .. A.id, A.size)
grow('answers', A.size)
grow('answers:' .. A.key, A.size)
forget_expired('answers', 'answer:', forget_answer)
local mine = 'answers:' .. A.key
while sum(mine) > A.key_answers_bytes_max
    or redis.call('ZCARD', P .. mine) > A.key_answers_max do
  forget_answer(oldest(mine))
end
while sum('answers') > A.answers_bytes_max do forget_answer(oldest('answers')) end
return 0
"""
)

GET_ANSWER = (
    _COMMON
    + """
local found = redis.call('HMGET', P .. 'answer:' .. A.id, 'fingerprint', 'process', 'body',
  'status', 'headers', 'ends_at')
if not found[1] or tonumber(found[6]) <= now then return false end
return found
"""
)

DROP_ANSWER = (
    _COMMON
    + """
local found = redis.call('HMGET', P .. 'answer:' .. A.id, 'process', 'body')
if found[1] == A.process and not found[2] then redis.call('DEL', P .. 'answer:' .. A.id) end
return 0
"""
)

GET_ENTRIES = (
    _COMMON
    + """
local found = {}
for place, name in ipairs(A.names) do
  local entry = redis.call('HMGET', P .. 'cache:' .. name, 'body', 'ends_at')
  found[place] = entry[1] and tonumber(entry[2]) > now and entry[1]
end
return found
"""
)

ENTRY_KEYS = (
    _COMMON
    + """
local seen = A.seen
if seen > tonumber(redis.call('GET', P .. 'turns') or 0) then seen = 0 end
local from = string.format('(%.0f', seen)
return {
  redis.call('ZRANGEBYSCORE', P .. 'cache', from, '+inf', 'WITHSCORES', 'LIMIT', 0, A.limit),
  redis.call('ZCARD', P .. 'cache'),
  string.format('%.0f', seen),
}
"""
)

PUT_ENTRIES = (
    _COMMON
    + _KEPT
    + """
for place, name in ipairs(A.names) do
  forget_entry(name)
  local body = ARGV[2 + place]
  redis.call('HSET', P .. 'cache:' .. name, 'body', body, 'ends_at', now + A.ttl_s)
  redis.call('EXPIREAT', P .. 'cache:' .. name, math.ceil(now + A.ttl_s))
  redis.call('ZADD', P .. 'cache', redis.call('INCR', P .. 'turns'), name)
  redis.call('HSET', P .. 'sizes', 'cache:' .. name, #body + A.entry_bytes)
  redis.call('HSET', P .. 'groups', name, A.group)
  redis.call('SADD', P .. 'group:' .. A.group, name)
  grow('cache', #body + A.entry_bytes)
end
forget_expired('cache', 'cache:', forget_entry)
while sum('cache') > A.cache_bytes_max do forget_entry(oldest('cache')) end
return 0
"""
)

DROP_ENTRIES = (
    _COMMON
    + _KEPT
    + """
local names = redis.call('SRANDMEMBER', P .. 'group:' .. A.group, A.limit)
local dropped = 0
for _, name in ipairs(names) do
  dropped = dropped + redis.call('EXISTS', P .. 'cache:' .. name)
  forget_entry(name)
end
return {#names, dropped}
"""
)
