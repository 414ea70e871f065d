// The last ten minutes as columns of equal length, from the event `history` and each `stats` since; null is no data.
const MAX_SPAN = 600; // seconds
const MIN_SPAN = 120;
const SERVER = {
  active: (stats) => stats.connections.active,
  waiting: (stats) => stats.connections.waiting,
  rejected_per_second: (stats) => stats.connections.rejected_per_second,
  requests_per_second: (stats) => stats.requests.per_second,
  tokens_per_second: (stats) => stats.tokens_per_second,
  first_token_p50: (stats) => stats.first_token?.p50,
  first_token_p95: (stats) => stats.first_token?.p95,
  lag_max: (stats) => stats.loop.lag_max,
};
const PROVIDER = ["in_flight", "waiting"];

export class History {
  times = [];
  server = Object.fromEntries(Object.keys(SERVER).map((name) => [name, []]));
  providers = new Map(); // name → { in_flight, waiting }
  #interval = 1;

  /** The seconds that the charts show, in whole minutes: a server that was just started has few data. */
  get span() {
    const known = this.times.at(-1) - this.times[0] || 0;
    return Math.min(MAX_SPAN, Math.max(MIN_SPAN, Math.ceil(known / 60) * 60));
  }

  /** Take the server's history. Older data of this page are kept, with a gap between the two. */
  replace({ interval, time, series, providers }) {
    this.#interval = interval;
    if (time.length === 0) return;
    this.#cut(0, this.times.findIndex((other) => other >= time[0]));
    if (this.times.length) this.#append(this.times.at(-1) + interval / 2, {}, {});
    time.forEach((moment, at) => {
      const row = (columns) => Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, column[at]]));
      const each = Object.fromEntries(Object.entries(providers).map(([name, columns]) => [name, row(columns)]));
      this.#append(moment, row(series), each);
    });
    this.#trim();
  }

  add(stats) {
    const last = this.times.at(-1);
    if (stats.time < last - 5) this.#cut(0, 0); // the server's clock was set back
    else if (stats.time <= last) return; // it is the newest snapshot of the history
    else if (stats.time > last + 3 * this.#interval) this.#append(last + this.#interval / 2, {}, {});
    for (const name of this.providers.keys()) if (!(name in stats.providers)) this.providers.delete(name);
    const row = Object.fromEntries(Object.entries(SERVER).map(([name, pick]) => [name, pick(stats)]));
    this.#append(stats.time, row, stats.providers);
    this.#trim();
  }

  #append(time, row, each) {
    for (const [name, column] of Object.entries(this.server)) column.push(row[name] ?? null);
    for (const name of Object.keys(each)) {
      if (this.providers.has(name)) continue;
      this.providers.set(name, Object.fromEntries(PROVIDER.map((field) => [field, this.times.map(() => null)])));
    }
    for (const [name, columns] of this.providers) {
      for (const field of PROVIDER) columns[field].push(each[name]?.[field] ?? null);
    }
    this.times.push(time);
  }

  #trim() {
    const from = this.times.at(-1) - MAX_SPAN;
    if (this.times[0] < from) this.#cut(this.times.findIndex((other) => other >= from), -1);
  }

  /** Keep the rows from *from* up to, but not including, *to*; -1 is the end. */
  #cut(from, to) {
    const columns = [this.times, ...Object.values(this.server), ...[...this.providers.values()].flatMap(Object.values)];
    for (const column of columns) {
      if (to >= 0) column.length = to;
      column.splice(0, from);
    }
  }
}
