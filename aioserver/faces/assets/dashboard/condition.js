// The condition of one provider: a word, a tone, a shape, and how much it limits the server.
const TROUBLES = { key_refused: ["cross", 6.5], dead: ["diamond", 6], silent: ["diamond", 5.5], sick: ["diamond", 5.2], failing: ["diamond", 5] };

/** Return {word, tone, shape, rank}: from rank 2 on a provider can be the reason for a wait, from 5 on it is in trouble. */
export function conditionOf({ usable, active, trouble, waiting, limit, in_flight: taken, pool, pace }) {
  const condition = (word, tone, shape, rank) => ({ word, tone, shape, rank });

  if (!usable) return active ? condition("Not usable", "bad", "cross", 7) : condition("Not usable", "neutral", "cross", 0);
  if (trouble) {
    // The word and the severity come from the server: its verdict, its log and the command `top` show the same.
    const [shape, rank] = TROUBLES[trouble.kind] ?? ["diamond", 5];
    return condition(trouble.word, trouble.severity === "error" ? "bad" : "warning", shape, rank);
  }
  if (pace?.cooling > 0) return condition("Cooling down", "warning", "diamond", 4.5);
  if (waiting > 0) return condition("Queueing", "warning", "triangle", 3 + waiting / (waiting + 1000));
  if (pool?.waiting > 0) return condition("Pool exhausted", "warning", "triangle", 2.6);
  if (limit > 0 && taken >= limit) return condition("Full", "warning", "square", 2.2);
  if (taken > 0) return condition("Working", "good", "circle", 1);
  return condition("Idle", "good", "ring", 0.5);
}
