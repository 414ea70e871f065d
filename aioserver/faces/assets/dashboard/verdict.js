// The verdict while no data comes from the server. Otherwise the server judges itself: the verdict is part of its snapshot,
// so that the log and the command `top` say the same.
import { seconds } from "/assets/dashboard/numbers.js";

/** Return the verdict while no data comes: *link* is the state of the connection, *silence* and *now* are milliseconds. */
export function disconnected(link, silence, now) {
  const retry = link.retryAt > now ? `next attempt in ${seconds(Math.ceil((link.retryAt - now) / 1000))}` : "connecting again";
  const duration = seconds(Math.floor(silence / 1000));
  const text = link.up
    ? `The server has sent no data for ${duration}`
    : link.reason
      ? `The server rejects this page, ${retry}`
      : `The server has been unreachable for ${duration}, ${retry}`;
  return { level: "none", state: "lost", word: "Disconnected", text, detail: link.reason ? `Its message: ${link.reason}` : "The numbers below are out of date.", advice: "", about: "" };
}
