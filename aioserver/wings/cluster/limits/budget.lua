#!lua
-- The tokens of one key, in one atomic call: a bucket of the minute that drains evenly, the queue of those that wait
-- for room in it, and the count of a day.
--
-- KEYS[1] is the prefix of all keys of the cluster; ARGV[1] is the question and the result is the answer, both in
-- msgpack, as shared_budget.py declares them. Times are in microseconds. PREFIX tokens:NAME has the state. The position
-- of a token is its number among all that have ever come into the bucket; `gone` of them are not there any more.
local DAY, MINUTE, ROUNDING = 86400000000, 60000000, 1e-6
-- A request that waits is asked for again within this time, or waits no more.
local SILENCE = 2500000

local function read(key)
  local text = redis.call('GET', KEYS[1] .. key)
  return text and cmsgpack.unpack(text)
end

local me, name, run, met, minute, day, tokens, more, patience, corrections, date, known, least_date, least_used =
  unpack(cmsgpack.unpack(ARGV[1]))
local world, time = read('world'), redis.call('TIME')
local now = time[1] * 1000000 + time[2] + (world and world.offset or 0)
-- The first renewal at a server that was away (renew.lua) notes until when nothing is given, and what it may have lost.
if not (world and world.life) or (run ~= '' and run ~= world.run) or now - world.last > world.pause then
  return redis.error_reply('CLOSED the server has just begun')
end
now = math.max(now, world.last)
local life, closed = world.life, math.max(0, world.blind - now, (world.lost or 0) - now)
local rate, today = minute / MINUTE, math.floor(now / DAY)
local level, gone, at, number, used, waiting, told, since =
  unpack(read('tokens:' .. name) or { 0, 0, now, today, 0, {}, 0, life })

local out = minute > 0 and math.min(level, math.max(0, now - at) * rate) or level
level, gone = level - out, gone + out
-- The most of the day that any instance has told since the loss is what all had used then.
if since ~= life or closed == 0 then told = used end
if today > number then number, used, told = today, 0, 0 end
local least = least_date == number and least_used or 0
if met ~= life then
  -- The minute may have been used up then.
  if met > 0 then level = math.max(level, minute - (now - life) * rate) end
  if date == number then least = math.max(least, known) end
end
used, told = used + math.max(0, least - told), math.max(told, least)
for _, item in ipairs(corrections) do
  local of_minute, of_day, stood, of_life, of_date = unpack(item)
  if of_minute > 0 then
    level = level + of_minute
  elseif of_life == life then
    -- What has drained does not come back, and what others gave back since may have stood in front of it.
    local back = math.max(0, math.min(-of_minute, stood - gone, level))
    level, gone = level - back, gone + back
  end
  if of_date == number then used = math.max(0, used + of_day) end
end

local queue, ahead, place = {}, 0, nil
for _, item in ipairs(waiting) do
  if item[1] == me then
    place = #queue + 1
  elseif now <= item[3] then
    ahead = ahead + (place and 0 or item[2])
    table.insert(queue, item)
  end
end
-- What is more than a whole budget counts as that budget. The level comes first: the sum is exact in an empty bucket.
local most, of_the_day, wait, by_day = math.min(tokens, minute), math.min(tokens, day), closed, false
local missing = level + most + ahead - minute
if minute > 0 and missing > ROUNDING then wait = math.max(wait, missing / rate) end
local queued, rest = tokens > 0 and closed == 0 and wait > 0 and wait <= patience, (number + 1) * DAY - now
if day > 0 and used + of_the_day > day then
  queued, by_day, wait = false, rest >= wait, math.max(wait, rest)
end
local granted = tokens > 0 and wait == 0
if queued then table.insert(queue, place or #queue + 1, { me, most, now + SILENCE }) end
if not granted or #queue > 0 or (minute > 0 and more > -missing) or (day > 0 and used + of_the_day + more > day) then more = 0 end
if granted then
  level = level + (minute > 0 and most + more or 0)
  used = used + (day > 0 and of_the_day + more or 0)
end
local state = cmsgpack.pack({ level, gone, now, number, used, queue, told, life })
redis.call('SET', KEYS[1] .. 'tokens:' .. name, state, 'EX', DAY / 1000000)
return cmsgpack.pack({ granted, queued, wait, by_day, more, closed, level, gone, life, number, used, rest })
