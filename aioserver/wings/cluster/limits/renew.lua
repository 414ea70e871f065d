#!lua
-- A renewal: everything that one instance has to say to the others, in one atomic call.
--
-- KEYS[1] is the prefix of all keys of the cluster; ARGV[1] is the request and the result is the answer, both in
-- msgpack, as lease_messages.py declares them. tests/support/renew_script.py has the reasons for what it
-- does, and runs it for tests in virtual time. Times are in microseconds. What is kept:
--
--   PREFIX world       the members and the time          PREFIX names       the names of all limits
--   PREFIX limit:NAME  who holds and wants how much      PREFIX pace:NAME   when its next slot begins
--   PREFIX told        what is known of providers        PREFIX wake:INSTANCE  a channel that wakes an instance
--   PREFIX m           the names of all members
--
-- Lua iterates over a table in no order, and compares strings by the server's locale: so whoever comes first
-- is decided by numbers. Numbers are passed to commands as they are: `..` would keep 14 digits of them.
local PREFIX, DAY = KEYS[1], 86400
local ENDS, SEQ, NUMBER, HEARD, SILENT = 1, 2, 3, 4, 5
local HELD, KNOWS = 1, 2
local TAG, ORDER, NEED, WEIGHT = 1, 2, 3, 4

local function read(key)
  local text = redis.call('GET', PREFIX .. key)
  return text and cmsgpack.unpack(text)
end

local function write(key, value)
  redis.call('SET', PREFIX .. key, cmsgpack.pack(value), 'EX', DAY)
end

local function size(items)
  local count = 0
  for _ in pairs(items) do count = count + 1 end
  return count
end

local me, epoch, run, seq, heard, version, times, known, ended, bye, ops, paces, tells = unpack(cmsgpack.unpack(ARGV[1]))
local LEASE, PAUSE, BLIND, UNHEARD, GONE = unpack(times)

-- The time goes on evenly, also when the machine's is put back.
local time = redis.call('TIME')
local wall = time[1] * 1000000 + time[2]
local world = read('world')
if not world then
  world = {
    epoch = me .. '@' .. string.format('%.0f', wall), run = run, last = wall, offset = 0, blind = wall + BLIND,
    number = 0, version = 0, members = {}, gone = {}, awaited = {}, lost = wall + BLIND, life = wall,
    silent = {}, before = wall + BLIND,
  }
end
local former_number = world.number
local members, gone, awaited = world.members, world.gone, world.awaited
local former = members[me] or gone[me]
if former and seq <= former[SEQ] then return redis.error_reply('STALE the call was given up') end
local now = wall + world.offset
if now < world.last then
  world.offset = world.last - wall
  now = world.last
end

local wakes = {}
local function tell(instance, word)
  wakes[instance] = wakes[instance] or {}
  table.insert(wakes[instance], word)
end

-- Nobody has called, or this is another server with an older state: whoever lives is to say what he has.
local moved = run ~= '' and run ~= world.run
if moved or (now - world.last > PAUSE and next(members)) then
  -- Those whose silence makes it blind, and until when it is without them.
  local before = world.blind
  world.blind = math.max(world.blind, now + BLIND)
  if moved or now >= before or not world.silent then
    world.silent, world.before = {}, moved and world.blind or before
  end
  for instance, member in pairs(members) do
    if not moved then world.silent[instance] = 1 end
    -- An older state lacks the last renewals, and what was given with them.
    member[ENDS] = math.max(member[ENDS], now + (moved and LEASE or BLIND))
    if moved then member[SILENT] = 1 end
    tell(instance, '')
  end
end
if moved then
  world.run = run
  world.lost, world.life = math.max(world.lost or 0, now + BLIND), now
end
world.last = now

local limits, touched = {}, {}
local function touch(name)
  if limits[name] == nil then
    limits[name] = read('limit:' .. name) or { limit = 0, virtual = 0, orders = 0, holds = {}, wants = {}, turns = {}, unheard = {} }
    table.insert(touched, name)
  end
  return limits[name]
end
local function forget(instance)
  for _, name in ipairs(redis.call('SMEMBERS', PREFIX .. 'names')) do
    local limit = touch(name)
    limit.holds[instance], limit.wants[instance] = nil, nil
    limit.turns[instance], limit.unheard[instance] = nil, nil
  end
end
local function leave(instance)
  if members[instance] then forget(instance) end
  if members[instance] or gone[instance] then world.number = world.number + 1 end
  members[instance], gone[instance] = nil, nil
end

for instance, member in pairs(members) do
  if member[ENDS] < now and instance ~= me then
    leave(instance)
    gone[instance] = member
  end
end
for instance, member in pairs(gone) do
  if member[ENDS] + GONE < now then leave(instance) end
end
for _, instance in ipairs(ended) do
  leave(instance)
  if world.silent and world.silent[instance] then
    world.silent[instance] = nil
    -- Nobody lives who could have used more than is known here.
    if not next(world.silent) then world.blind = world.before end
  end
end

-- Renew my lease. Whoever comes anew says what it has, and whom it knew.
local mine = members[me]
local anew = not mine or mine[ENDS] < now or epoch ~= world.epoch
if bye then
  leave(me)
else
  if not mine then
    world.number = world.number + 1
    mine = gone[me] or { 0, 0, world.number, 0 }
    gone[me] = nil
    members[me] = mine
  elseif anew then
    forget(me)
  end
  awaited[me] = nil
  mine[ENDS], mine[SEQ], mine[SILENT] = now + LEASE, seq, nil
  mine[HEARD] = epoch == world.epoch and heard or 0
end
for instance, ends in pairs(awaited) do
  if ends < now or members[instance] then awaited[instance] = nil end
end
if (anew and now < world.blind or now < (world.lost or 0)) and not bye then
  for _, instance in ipairs(known) do
    if not members[instance] and not awaited[instance] then
      awaited[instance] = now + LEASE
      tell(instance, '')
    end
  end
end
local blind_ends = world.blind
for _, member in pairs(members) do
  if member[SILENT] then blind_ends = math.max(blind_ends, member[ENDS]) end
end
local blind = now < blind_ends
local missing = size(awaited)
local reserve = missing / math.max(1, missing + size(members))

-- What I have is what I say, unless more is known here.
local newly, spare = {}, {}
if not bye then
  for _, op in ipairs(ops) do
    local name, have, give, want, weight, most, more = unpack(op)
    local limit = touch(name)
    limit.limit, limit.unheard[me], spare[name] = most, nil, more
    local held = (limit.holds[me] or { 0, 0 })[HELD] - give
    if anew or held < have then held = have end
    limit.holds[me] = { held, 0 }
    want = want - (held - have)
    if want <= 0 then
      limit.wants[me] = nil
    elseif limit.wants[me] then
      limit.wants[me][NEED], limit.wants[me][WEIGHT] = want, weight
    else
      limit.orders = limit.orders + 1
      limit.wants[me] = { math.max(limit.virtual, limit.turns[me] or 0), limit.orders, want, weight }
      newly[name] = true
    end
  end
end

local function first(wants)
  local who
  for instance, want in pairs(wants) do
    local best = wants[who]
    if not best or want[TAG] < best[TAG] or (want[TAG] == best[TAG] and want[ORDER] < best[ORDER]) then
      who = instance
    end
  end
  return who
end

-- Free places go to the one whose turn it is: start-time fair queueing over the instances.
local over = {}
for _, name in ipairs(touched) do
  local limit, total = limits[name], 0
  local holds, wants = limit.holds, limit.wants
  for _, hold in pairs(holds) do total = total + hold[HELD] end
  local free = blind and 0 or limit.limit - math.ceil(limit.limit * reserve) - total
  over[name] = math.max(0, total - limit.limit)
  while free > 0 do
    local who = first(wants)
    if not who then break end
    local want, since = wants[who], limit.unheard[who]
    if since and now - since > UNHEARD then
      wants[who] = nil
    else
      holds[who] = holds[who] or { 0, 0 }
      holds[who][HELD] = holds[who][HELD] + 1
      free = free - 1
      limit.virtual = want[TAG]
      want[TAG] = want[TAG] + 1 / want[WEIGHT]
      limit.turns[who] = want[TAG]
      want[NEED] = want[NEED] - 1
      if want[NEED] <= 0 then wants[who] = nil end
      if who ~= me and not since then
        limit.unheard[who] = now
        tell(who, name)
      end
    end
  end
  if free > 0 and (spare[name] or 0) > 0 then
    holds[me][HELD] = holds[me][HELD] + math.min(free, spare[name])
  end
  if newly[name] and wants[me] then
    for instance, hold in pairs(holds) do
      if instance ~= me and hold[HELD] > 0 and hold[KNOWS] == 0 then
        hold[KNOWS] = 1
        tell(instance, '?' .. name)
      end
    end
  end
end

local results = {}
for _, op in ipairs(bye and {} or ops) do
  local limit = limits[op[1]]
  local hold = limit.holds[me]
  local starving = size(limit.wants) - (limit.wants[me] and 1 or 0)
  hold[KNOWS] = starving > 0 and 1 or 0
  table.insert(results, { hold[HELD], starving, math.max(0, hold[HELD] - over[op[1]]) })
end

for _, name in ipairs(touched) do
  local limit = limits[name]
  for instance, hold in pairs(limit.holds) do
    if hold[HELD] == 0 then limit.holds[instance] = nil end
  end
  if not next(limit.wants) then
    -- In an empty queue nobody is ahead or behind.
    limit.virtual, limit.orders, limit.turns = 0, 0, {}
  end
  if next(limit.holds) or next(limit.wants) then
    write('limit:' .. name, limit)
    redis.call('SADD', PREFIX .. 'names', name)
    redis.call('EXPIRE', PREFIX .. 'names', DAY)
  else
    redis.call('DEL', PREFIX .. 'limit:' .. name)
    redis.call('SREM', PREFIX .. 'names', name)
  end
end

-- Paces: GCRA. While starts may be forgotten that the instances know of, nothing has rested.
local slots = {}
for _, pace in ipairs(paces) do
  local name, count, step, slack, horizon, known = unpack(pace)
  local lost, first = world.lost or 0, 0
  -- Slots that were given before, and are forgotten, begin within a horizon.
  if now < lost then slack, first = 0, lost - BLIND + horizon end
  local due = tonumber(redis.call('GET', PREFIX .. 'pace:' .. name)) or 0
  due = math.max(due, now - slack, now + known, first)
  local delays = {}
  if count < 0 then due = math.max(due + count * step, now - slack) end
  while #delays < count and due <= now + horizon do
    table.insert(delays, math.max(0, due - now))
    due = due + step
  end
  redis.call('SET', PREFIX .. 'pace:' .. name, due, 'EX', DAY)
  table.insert(slots, { delays, due - now })
end

-- What is known of providers, for as long as it was said to hold.
local told = {}
if #tells > 0 or version ~= world.version then
  local states = read('told') or {}
  for _, item in ipairs(tells) do
    local name, word, length = unpack(item)
    states[name] = states[name] or {}
    states[name][word] = length > 0 and now + length or nil
    world.version = world.version + 1
  end
  if #tells > 0 then
    for instance in pairs(members) do
      if instance ~= me then tell(instance, '') end
    end
  end
  if #tells > 0 then
    for name, words in pairs(states) do
      for word, ends in pairs(words) do
        if ends < now then words[word] = nil end
      end
      if not next(words) then states[name] = nil end
    end
    write('told', states)
  end
  if version ~= world.version then
    for name, words in pairs(states) do
      for word, ends in pairs(words) do
        if ends >= now then table.insert(told, { name, word, ends - now }) end
      end
    end
  end
end

-- My place among all that may live, for fixed shares; whether all of them know of me.
local rank, count, known_to_all, names = missing, missing, missing == 0, {}
if not bye then
  for _, group in ipairs({ members, gone }) do
    for instance, member in pairs(group) do
      count = count + 1
      if member[NUMBER] < mine[NUMBER] then rank = rank + 1 end
      if instance ~= me and member[HEARD] < mine[NUMBER] then known_to_all = false end
    end
  end
  if heard ~= world.number or epoch ~= world.epoch then
    for instance in pairs(members) do table.insert(names, instance) end
    table.sort(names, function(one, other) return members[one][NUMBER] < members[other][NUMBER] end)
  end
end

-- For budget.lua.
world.pause, world.life = PAUSE, world.life or now
write('world', world)
-- The members by themselves, for the scripts of claims (wings/cluster/answers/claims.py).
if world.number ~= former_number or redis.call('EXISTS', PREFIX .. 'm') == 0 then
  redis.call('DEL', PREFIX .. 'm')
  for instance, member in pairs(members) do redis.call('ZADD', PREFIX .. 'm', member[NUMBER], instance) end
end
redis.call('EXPIRE', PREFIX .. 'm', DAY)
for instance, words in pairs(wakes) do
  redis.call('PUBLISH', PREFIX .. 'wake:' .. instance, cmsgpack.pack(words))
end
return cmsgpack.pack({
  world.epoch, anew, math.max(0, blind_ends - now), world.number, rank, count, known_to_all, names, world.version, told,
  results, slots,
})
