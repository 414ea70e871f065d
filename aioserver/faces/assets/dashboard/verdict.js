// The state of the whole server in one word, one shape and one sentence. Of several troubles the worst is shown.
import { count, seconds, some, words } from "/assets/dashboard/numbers.js";

const RECENT = 10; // seconds for which a rejection or a delay of the event loop stays in the sentence
const NOTICEABLE_DELAY = 0.25; // seconds of event-loop delay that clients notice

/** Return the verdict on a server that answers. *conditions* is a map of provider → condition. */
export function verdictOf(stats, conditions, recent) {
  const { active, limit, waiting, oldest_wait: oldest } = stats.connections;
  const [name, worst] = [...conditions].reduce((a, b) => (b[1].rank > a[1].rank ? b : a), ["", { rank: -1 }]);
  const constrained = worst.rank >= 2;
  const free = Math.max(0, limit - active);
  const rejected = rejections(stats, recent);
  const delay = recent.highest(RECENT, (snapshot) => snapshot.loop.lag_max);
  const room = free ? `Room for ${count(free)} more` : "No room left";
  const cause = constrained ? `${name} is the reason` : `the limit of ${count(limit)} is the reason`;
  const queue = `${some(waiting, "waits", "wait")}, oldest ${seconds(oldest)}`;
  const verdict = (state, word, text, subject = "") => {
    const why = constrained && !text.includes(worst.why) ? `${worst.why}. ` : "";
    const more = worst.detail ? `${worst.detail}. ` : "";
    return { state, word, text, detail: why + more + latency(stats.first_token), key: `${state} ${subject}` };
  };

  if (!stats.ready) {
    const usable = Object.values(stats.providers).some((provider) => provider.usable);
    return verdict("closed", "Not ready", usable ? "Starting or stopping: new requests are rejected" : "No provider is usable: nobody gets an answer");
  }
  if (rejected.number > 0) {
    const where = active >= limit ? (waiting ? `, ${queue}; ${cause}` : `; ${cause}`) : constrained ? `; ${name} is the reason` : `: ${rejected.code}`;
    return verdict("rejecting", "Rejecting", `${count(rejected.number)} rejected in ${seconds(RECENT)}${where}`, name);
  }
  const stalled = [...conditions].find(([, condition]) => condition.kind === "silent");
  if (stalled) return verdict("trouble", "Stalled", stalled[1].why, stalled[0]);
  if (waiting > 0) return verdict("full", "Full", `Full: ${queue}; ${cause}`, name);
  if (free === 0) return verdict("full", "Full", `Full: nobody waits yet; ${cause}`, name);
  if (worst.rank >= 5) return verdict("trouble", "Trouble", `${room}, but ${worst.brief}`, name);
  if (delay >= NOTICEABLE_DELAY) return verdict("busy", "Slow", `${room}, but the event loop was delayed by ${seconds(delay)}`, "loop");
  if (constrained) return verdict("busy", "Busy", `${room}, but ${worst.brief}`, name);
  if (active >= 0.9 * limit) return verdict("busy", "Nearly full", room);
  return verdict("open", "Open", room);
}

/** Return the verdict while no data comes: *link* is the state of the connection, *silence* and *now* are milliseconds. */
export function disconnected(link, silence, now) {
  const retry = link.retryAt > now ? `next attempt in ${seconds(Math.ceil((link.retryAt - now) / 1000))}` : "connecting again";
  const duration = seconds(Math.floor(silence / 1000));
  const text = link.up
    ? `The server has sent no data for ${duration}`
    : link.reason
      ? `The server rejects this page, ${retry}`
      : `The server has been unreachable for ${duration}, ${retry}`;
  return { state: "lost", word: "Disconnected", text, detail: link.reason ? `Its message: ${link.reason}` : "The numbers below are out of date.", key: "lost" };
}

function rejections(stats, recent) {
  const { connections, rejections: recently } = recent.growth(RECENT);
  const codes = Object.entries(recently);
  const number = codes.reduce((sum, [, growth]) => sum + growth, 0);
  const most = codes.reduce((a, b) => (b[1] > a[1] ? b : a), ["no place", 0]);
  // A page that was just opened has only one snapshot, and shows the rate that the server computed.
  return { number: Math.max(number, connections.rejected, Math.round(stats.connections.rejected_per_second)), code: words(most[0]) };
}

/** A sentence about the time to the first token; "" if no answer has begun recently. */
function latency(token) {
  if (!token || token.age > RECENT) return "";
  return `Half of the answers begin within ${seconds(token.p50)}, 95\u00a0% within ${seconds(token.p95)}.`;
}
