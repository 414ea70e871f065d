// The condition of one provider: a word, a shape, how much it limits the server, and a sentence with the reason.
import { count, seconds, some } from "/assets/dashboard/numbers.js";

const TROUBLES = {
  key_refused: ["Key refused", "bad", "cross", 6.5],
  dead: ["Dead", "bad", "diamond", 6],
  silent: ["Stalled", "bad", "diamond", 5.5],
  sick: ["Sick", "bad", "diamond", 5.2],
  failing: ["Failing", "bad", "diamond", 5],
};

/** Return {word, tone, shape, rank, why, brief}: from rank 2 on it can be the reason for a wait, from 5 on it fails. */
export function conditionOf(name, provider) {
  const { waiting, limit, in_flight: taken, pool, pace } = provider;
  const condition = (word, tone, shape, rank, why, brief = `${name} ${why}`) => ({ word, tone, shape, rank, why: `${name} ${why}`, brief });
  // The words for a trouble come from the server: its log and the command `top` show the same.
  const trouble = provider.trouble && TROUBLES[provider.trouble.kind];

  if (!provider.usable) {
    return provider.active
      ? condition("Not usable", "bad", "cross", 7, "is not usable")
      : condition("Not usable", "neutral", "cross", 0, "is not usable");
  }
  if (trouble) {
    const [word, tone, shape, rank] = trouble;
    const { kind, text, detail } = provider.trouble;
    return { word, tone, shape, rank, why: text, brief: text, detail, kind };
  }
  if (pace?.cooling > 0) return condition("Cooling down", "warning", "diamond", 4.5, `cools down for ${seconds(pace.cooling)} more, as it asked`);
  const paced = pace?.left === 0 && taken < limit; // places are free, but no start is allowed yet
  const share = paced ? `has used its pace of ${count(pace.per_minute)} a minute` : limit > 0 ? `has ${count(taken)} of ${count(limit)} places taken` : `answers ${count(taken)} requests`;
  if (waiting > 0) {
    const queue = some(waiting, "waits", "wait");
    const why = `${share}, ${queue} for it, oldest ${seconds(provider.oldest_wait)}`;
    return condition("Queueing", "warning", "triangle", 3 + waiting / (waiting + 1000), why, `${queue} for ${name}`);
  }
  if (pool?.waiting > 0) return condition("Pool exhausted", "warning", "triangle", 2.6, `has no free connection for ${count(pool.waiting)}`);
  if (limit > 0 && taken >= limit) return condition("Full", "warning", "square", 2.2, share, `all ${count(limit)} places of ${name} are taken`);
  if (taken > 0) return condition("Working", "good", "circle", 1, share);
  return condition("Idle", "good", "ring", 0.5, "is idle");
}
