// The whole state of the house in one word, one shape and one sentence; the worst is said first.
import { count, seconds, some, words } from "/assets/dashboard/numbers.js";

const LATELY = 10; // seconds that a refusal or a pause of the loop stays in the sentence
const LATE = 0.25; // seconds of event-loop lag that clients feel

/** What is said of a server that answers. *conditions* is a map: provider → its condition. */
export function judge(stats, conditions, recent) {
  const { active, limit, waiting, oldest_wait: oldest } = stats.connections;
  const [name, worst] = [...conditions].reduce((a, b) => (b[1].rank > a[1].rank ? b : a), ["", { rank: -1 }]);
  const pressed = worst.rank >= 2;
  const free = Math.max(0, limit - active);
  const refused = refusals(stats, recent);
  const stood = recent.worst(LATELY, (one) => one.loop.lag_max);
  const room = free ? `Room for ${count(free)} more` : "No room left";
  const cause = pressed ? `${name} is the reason` : `the limit of ${count(limit)} is the reason`;
  const crowd = `${some(waiting, "waits", "wait")}, oldest ${seconds(oldest)}`;
  const say = (state, word, text, reason = "") => {
    const why = pressed && !text.includes(worst.why) ? `${worst.why}. ` : "";
    const more = worst.detail ? `${worst.detail}. ` : "";
    return { state, word, text, detail: why + more + feeling(stats.first_token), key: `${state} ${reason}` };
  };

  if (!stats.ready) {
    const usable = Object.values(stats.providers).some((one) => one.usable);
    return say("closed", "Not ready", usable ? "Starting or stopping: new work is not taken" : "No provider is usable: nobody gets an answer");
  }
  if (refused.number > 0) {
    const where = active >= limit ? (waiting ? `, ${crowd}; ${cause}` : `; ${cause}`) : pressed ? `; ${name} is the reason` : `: ${refused.code}`;
    return say("refusing", "Refusing", `${count(refused.number)} turned away in ${seconds(LATELY)}${where}`, name);
  }
  const stalled = [...conditions].find(([, one]) => one.kind === "silent");
  if (stalled) return say("trouble", "Stalled", stalled[1].why, stalled[0]);
  if (waiting > 0) return say("full", "Full", `Full: ${crowd}; ${cause}`, name);
  if (free === 0) return say("full", "Full", `Full: nobody waits yet; ${cause}`, name);
  if (worst.rank >= 5) return say("trouble", "Trouble", `${room}, but ${worst.brief}`, name);
  if (stood >= LATE) return say("busy", "Slow", `${room}, but the server itself stood still for ${seconds(stood)}`, "loop");
  if (pressed) return say("busy", "Busy", `${room}, but ${worst.brief}`, name);
  if (active >= 0.9 * limit) return say("busy", "Nearly full", room);
  return say("open", "Open", room);
}

/** What is said while nothing is heard: of *link*, *since* milliseconds, and whether there was ever a word. */
export function silence(link, since, now) {
  const again = link.retryAt > now ? `trying again in ${seconds(Math.ceil((link.retryAt - now) / 1000))}` : "trying again";
  const text = link.up
    ? `Server silent since ${seconds(Math.floor(since / 1000))}, waiting for a word`
    : link.reason
      ? `Server refuses this page, ${again}`
      : `Server not reachable since ${seconds(Math.floor(since / 1000))}, ${again}`;
  return { state: "lost", word: "No contact", text, detail: link.reason ? `It says: ${link.reason}` : "What stands below is old.", key: "lost" };
}

function refusals(stats, recent) {
  const { connections, rejections } = recent.over(LATELY);
  const codes = Object.entries(rejections);
  const number = codes.reduce((sum, [, of]) => sum + of, 0);
  const most = codes.reduce((a, b) => (b[1] > a[1] ? b : a), ["no place", 0]);
  // A page just opened has nothing to subtract from yet, but the server's own rate.
  return { number: Math.max(number, connections.rejected, Math.round(stats.connections.rejected_per_second)), code: words(most[0]) };
}

function feeling(token) {
  if (!token || token.age > LATELY) return ""; // nothing is answered now: the past tells nobody how it is
  return `Half of the answers begin within ${seconds(token.p50)}, 95\u00a0% within ${seconds(token.p95)}.`;
}
