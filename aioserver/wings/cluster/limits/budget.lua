#!lua
-- The tokens of one key, in one atomic call: a bucket of the minute that drains evenly, the queue of those that wait
-- for room in it, and the counts of a day, a week and a month, in this order wherever there are three numbers.
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

-- The numbers of the periods in which a day is, which is counted from 1970-01-01, a Thursday. Months are counted as by
-- Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", 2013 (civil_from_days): in years that begin in March.
local function periods_of(day)
  local days = day + 719468
  local era = math.floor(days / 146097)
  local rest = days - era * 146097
  local years = math.floor((rest - math.floor(rest / 1460) + math.floor(rest / 36524) - math.floor(rest / 146096)) / 365)
  local of_year = rest - 365 * years - math.floor(years / 4) + math.floor(years / 100)
  local months = math.floor((5 * of_year + 2) / 153)
  return { day, math.floor((day - 4) / 7), 12 * (400 * era + years) + months }
end

-- The day on which the period number `at` of `day` has ended.
local function ended(day, at)
  local current = periods_of(day)[at]
  repeat day = day + 1 until periods_of(day)[at] ~= current
  return day
end

local me, name, run, met, minute, limits, tokens, more, patience, corrections, date, known, least_date, least_used =
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
-- A server of an earlier version knows the first eight, and keeps no others.
local level, gone, at, number, today_used, waiting, today_told, since, longer =
  unpack(read('tokens:' .. name) or { 0, 0, now, today, 0, {}, 0, life })
longer = longer or { 0, 0, 0, 0 }
local used, told = { today_used, longer[1], longer[2] }, { today_told, longer[3], longer[4] }

local out = minute > 0 and math.min(level, math.max(0, now - at) * rate) or level
level, gone = level - out, gone + out
-- The minute may have been used up then.
if met > 0 and met ~= life then level = math.max(level, minute - (now - life) * rate) end
local former = periods_of(number)
number = math.max(number, today)
local current, of_date, of_least = periods_of(number), periods_of(date), periods_of(least_date)
for i = 1, 3 do
  -- The most that any instance has told since the loss is what all had used then.
  if since ~= life or closed == 0 then told[i] = used[i] end
  if current[i] > former[i] then used[i], told[i] = 0, 0 end
  local least = of_least[i] == current[i] and least_used[i] or 0
  if met ~= life and of_date[i] == current[i] then least = math.max(least, known[i]) end
  used[i], told[i] = used[i] + math.max(0, least - told[i]), math.max(told[i], least)
end
for _, item in ipairs(corrections) do
  local of_minute, counted, stood, of_life, day = unpack(item)
  if of_minute > 0 then
    level = level + of_minute
  elseif of_life == life then
    -- What has drained does not come back, and what others gave back since may have stood in front of it.
    local back = math.max(0, math.min(-of_minute, stood - gone, level))
    level, gone = level - back, gone + back
  end
  if counted ~= 0 then
    local periods = periods_of(day)
    for i = 1, 3 do
      if periods[i] == current[i] then used[i] = math.max(0, used[i] + counted) end
    end
  end
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
local most, counted, wait, by = math.min(tokens, minute), 0, closed, 0
for i = 1, 3 do
  if limits[i] > 0 then counted = math.min(counted > 0 and counted or tokens, limits[i]) end
end
local missing = level + most + ahead - minute
if minute > 0 and missing > ROUNDING then wait = math.max(wait, missing / rate) end
local queued, rest = tokens > 0 and closed == 0 and wait > 0 and wait <= patience, (number + 1) * DAY - now
for i = 1, 3 do
  if limits[i] > 0 then
    local left = limits[i] - used[i] - counted
    if left < 0 then
      local ends = ended(number, i) * DAY - now
      queued = false
      if ends > wait then by, wait = i, ends end
    end
    if more > left then more = 0 end
  end
end
local granted = tokens > 0 and wait == 0
if queued then table.insert(queue, place or #queue + 1, { me, most, now + SILENCE }) end
if not granted or #queue > 0 or (minute > 0 and more > -missing) then more = 0 end
if granted then
  level = level + (minute > 0 and most + more or 0)
  for i = 1, 3 do
    used[i] = used[i] + (counted > 0 and counted + more or 0)
  end
end
local kept = limits[3] > 0 and 31 or limits[2] > 0 and 7 or 1
local state =
  cmsgpack.pack({ level, gone, now, number, used[1], queue, told[1], life, { used[2], used[3], told[2], told[3] } })
redis.call('SET', KEYS[1] .. 'tokens:' .. name, state, 'EX', kept * DAY / 1000000)
return cmsgpack.pack({ granted, queued, wait, by, more, closed, level, gone, life, number, used, rest })
