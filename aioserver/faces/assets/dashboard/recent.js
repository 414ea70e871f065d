// The growth of counters: the server counts since its start, so this keeps the snapshots of a minute and subtracts.
const KEPT = 60; // seconds

/** Return every number of *now* minus that of *then*; a number that *then* lacks counts from zero. */
function difference(now, then) {
  const result = {};
  for (const [name, value] of Object.entries(now)) {
    if (typeof value === "number") result[name] = Math.max(0, value - (then?.[name] ?? 0));
    else if (value && typeof value === "object") result[name] = difference(value, then?.[name]);
  }
  return result;
}

export class Recent {
  #snapshots = [];

  add(stats) {
    const last = this.#snapshots.at(-1);
    // The counters of another process, or the times of another clock, cannot be compared.
    if (last && (stats.uptime < last.uptime || stats.time < last.time)) this.#snapshots = [];
    this.#snapshots.push(stats);
    while (this.#snapshots[0].time < stats.time - KEPT) this.#snapshots.shift();
  }

  /** Return the growth over the last *seconds*, or since the page was opened, if the server is older than both. */
  growth(seconds) {
    const now = this.#snapshots.at(-1);
    if (now.uptime <= seconds) return difference(now, undefined);
    return difference(now, this.#snapshots.find((snapshot) => snapshot.time >= now.time - seconds));
  }
}
