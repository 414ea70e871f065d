// One provider judged: how it is in a word and a shape, how much it presses, and a sentence that says why.
import { count, seconds, some } from "/assets/dashboard/numbers.js";

const TROUBLES = {
  key_refused: ["Key refused", "bad", "cross", 6.5],
  dead: ["Dead", "bad", "diamond", 6],
  silent: ["Stalled", "bad", "diamond", 5.5],
  sick: ["Sick", "bad", "diamond", 5.2],
  failing: ["Failing", "bad", "diamond", 5],
};

/** {word, tone, shape, rank, why, brief}: from rank 2 on it can be the reason for a wait, from 5 on it is broken. */
export function condition(name, provider) {
  const { waiting, limit, in_flight: taken, pool, pace } = provider;
  const is = (word, tone, shape, rank, why, brief = `${name} ${why}`) => ({ word, tone, shape, rank, why: `${name} ${why}`, brief });
  // The server has the words for a trouble: its log and `top` say the same.
  const trouble = provider.trouble && TROUBLES[provider.trouble.kind];

  if (!provider.usable) {
    return provider.active
      ? is("Not usable", "bad", "cross", 7, "is not usable")
      : is("Not usable", "gone", "cross", 0, "is not usable");
  }
  if (trouble) {
    const [word, tone, shape, rank] = trouble;
    const { kind, text, detail } = provider.trouble;
    return { word, tone, shape, rank, why: text, brief: text, detail, kind };
  }
  if (pace?.cooling > 0) return is("Resting", "wait", "diamond", 4.5, `asked for rest, ${seconds(pace.cooling)} more`);
  const held = pace?.left === 0 && taken < limit; // by the pace: places there are
  const share = held ? `used up its pace of ${count(pace.per_minute)} a minute` : limit > 0 ? `${count(taken)} of ${count(limit)} places taken` : `${count(taken)} requests under way`;
  if (waiting > 0) {
    const crowd = some(waiting, "waits", "wait");
    const why = `has ${share}, ${crowd} for it, oldest ${seconds(provider.oldest_wait)}`;
    return is("Queueing", "wait", "triangle", 3 + waiting / (waiting + 1000), why, `${crowd} for ${name}`);
  }
  if (pool?.waiting > 0) return is("Pool short", "wait", "triangle", 2.6, `has no free connection for ${count(pool.waiting)}`);
  if (limit > 0 && taken >= limit) return is("Full", "wait", "square", 2.2, `has ${share}`, `all ${count(limit)} places of ${name} are taken`);
  if (taken > 0) return is("Working", "good", "circle", 1, `has ${share}`);
  return is("Idle", "good", "ring", 0.5, "is idle");
}
