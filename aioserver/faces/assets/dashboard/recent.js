// What happened lately: the server counts since its start, so the snapshots of a minute are kept and subtracted.
const KEPT = 60;

/** Every number of *now* less what it was in *then*; what was not there then counts from zero. */
function difference(now, then) {
  const result = {};
  for (const [name, value] of Object.entries(now)) {
    if (typeof value === "number") result[name] = Math.max(0, value - (then?.[name] ?? 0));
    else if (value && typeof value === "object") result[name] = difference(value, then?.[name]);
  }
  return result;
}

export class Recent {
  #kept = [];

  add(stats) {
    const last = this.#kept.at(-1);
    if (last && (stats.uptime < last.uptime || stats.time < last.time)) this.#kept = []; // another process, another clock
    this.#kept.push(stats);
    while (this.#kept[0].time < stats.time - KEPT) this.#kept.shift();
  }

  /** The counters' growth over the last *seconds*, or since the page was opened. */
  over(seconds) {
    const now = this.#kept.at(-1);
    return difference(now, this.#kept.find((one) => one.time >= now.time - seconds));
  }

  /** The highest of what *pick* finds in the snapshots of the last *seconds*. */
  worst(seconds, pick) {
    const from = this.#kept.at(-1).time - seconds;
    return Math.max(0, ...this.#kept.filter((one) => one.time >= from).map((one) => pick(one) ?? 0));
  }
}
