// One provider judged: how it is in a word and a shape, how much it presses, and a sentence that says why.
import { count, seconds, some, words } from "/assets/dashboard/numbers.js";

const HARMLESS = new Set(["cancelled", "stale", "http_4xx"]); // the client left; repeated unseen; the caller's own fault

/** {word, tone, shape, rank, why, brief}: from rank 2 on it can be the reason for a wait, from 5 on it is broken. */
export function condition(name, provider, lately) {
  const { waiting, limit, in_flight: taken, pool, pace, breaker } = provider;
  const is = (word, tone, shape, rank, why, brief = `${name} ${why}`) => ({ word, tone, shape, rank, why: `${name} ${why}`, brief });

  if (provider.flagged) return is("Key refused", "bad", "cross", 6.5, "refuses our key");
  if (!provider.usable) {
    return provider.active
      ? is("Not usable", "bad", "cross", 7, "is not usable")
      : is("Not usable", "gone", "cross", 0, "is not usable");
  }
  if (breaker === "open") return is("Breaker open", "bad", "diamond", 6, "is cut off, its breaker is open");
  const faults = Object.entries(lately?.faults ?? {}).filter(([kind, number]) => number > 0 && !HARMLESS.has(kind));
  const failed = faults.reduce((sum, [, number]) => sum + number, 0);
  if (failed >= 3 && failed >= 0.1 * (lately.requests ?? 0)) {
    const most = faults.reduce((a, b) => (b[1] > a[1] ? b : a))[0];
    return is("Failing", "bad", "diamond", 5, `fails: ${some(failed, "fault", "faults")} in a minute, most ${words(most)}`);
  }
  if (pace?.cooling > 0) return is("Resting", "wait", "diamond", 4.5, `asked for rest, ${seconds(pace.cooling)} more`);
  if (breaker === "trial") return is("On trial", "wait", "diamond", 4, "is on trial after faults");
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
