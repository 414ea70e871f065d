// The connection to the WebSocket face: opened, watched, and opened again after it was lost.
//
//     connecting → waiting (the server is full) → inside → lost → connecting …
//                                                        → closed (until the person opens it)
//
// Nothing but a ping is sent before the server has let this socket in; its pong says that it has.
// So what a refused socket was to say is never half said.

const HEARD_WITHIN = 15_000; // milliseconds from a try to the server's first word
const LOOK_EVERY = 15_000; // silent for so long: a ping; for twice as long: lost
const GOOD_AFTER = 60_000; // a connection that lived so long was a good one
const ENDS = new Set([1000, 1002, 1003, 1007, 1008, 1009]); // coming back would help nobody

// Seconds to wait before try number `failures`, counted from 0; null: do not come back.
export function pause(code, failures, retryAfter = 0) {
  if (ENDS.has(code)) return null;
  if (code === 1012) return 1 + 9 * Math.random(); // a restart: not all at once
  const jitter = Math.random() * Math.min(30, 0.5 * 2 ** failures);
  return code === 1013 ? Math.max(5, retryAfter) + jitter : jitter;
}

export class Link {
  // `locate()` gives the address. `heard` has changed(), entered(), frame(frame), and two that tell
  // whether to come back at once: wanted(), where the socket was closed since nobody used it, and
  // tooLarge(), where a message was.
  constructor(locate, heard) {
    this.locate = locate;
    this.heard = heard;
    this.state = { name: "connecting" };
    this.trouble = null; // the state in which the connection was lost last, until it is there again
    this.failures = 0;
    this.socket = null;
    this.fault = null; // what the server said about the socket itself
    this.tries = 0;
    this.timers = [];
    window.addEventListener("online", () => this.hurry());
    document.addEventListener("visibilitychange", () => document.hidden || this.hurry());
  }

  get inside() {
    return this.state.name === "inside";
  }

  async connect() {
    this.drop();
    this.become({ name: "connecting", after: this.trouble });
    const mine = this.tries;
    let address;
    try {
      address = await this.locate();
    } catch {
      address = null;
    }
    if (mine !== this.tries) return; // another try has begun meanwhile
    if (address === null) {
      this.lose(1006);
      return;
    }
    this.socket = new WebSocket(address);
    this.socket.onopen = () => this.send({ action: "ping" });
    this.socket.onmessage = (message) => this.receive(JSON.parse(message.data));
    this.socket.onclose = (event) => this.lose(event.code);
    this.timers.push(setTimeout(() => this.lose(1006), HEARD_WITHIN));
  }

  // Try at once what would be tried later anyway; a full server is left in peace.
  hurry() {
    if (this.state.name === "lost" && this.state.code !== 1013) this.connect();
  }

  send(frame) {
    this.socket.send(JSON.stringify(frame));
  }

  receive(frame) {
    if (this.state.name === "connecting") this.clearTimers();
    this.silent = false;
    if (frame.status === "pong") {
      if (!this.inside) this.enter();
    } else if (frame.request_id !== null) {
      this.heard.frame(frame);
    } else if (frame.status === "queued") {
      this.become({ name: "waiting", ...frame.chunk });
    } else if (frame.status === "error") {
      this.fault = frame.chunk;
    }
  }

  enter() {
    this.trouble = null;
    this.become({ name: "inside" });
    this.timers.push(
      setTimeout(() => (this.failures = 0), GOOD_AFTER),
      setInterval(() => this.look(), LOOK_EVERY),
    );
    this.heard.entered();
  }

  // A cut cable tells nobody: ask after a silence. Nothing heard since the last look but one: lost.
  look() {
    if (this.silent && this.asked) {
      this.lose(1006);
      return;
    }
    this.asked = this.silent;
    if (this.silent) this.send({ action: "ping" });
    this.silent = true;
  }

  lose(code) {
    const fault = this.fault;
    this.drop();
    const atOnce =
      (code === 1000 && this.heard.wanted()) ||
      (code === 1009 && this.heard.tooLarge()) ||
      (code === 1008 && fault?.code === "invalid_api_key"); // to be asked for another key
    const seconds = atOnce ? 0 : pause(code, this.failures, fault?.retry_after);
    if (seconds === null) {
      this.trouble = { name: "closed", code, fault };
    } else {
      this.failures += 1;
      this.timers.push(setTimeout(() => this.connect(), seconds * 1000));
      this.trouble = { name: "lost", code, fault, until: Date.now() + seconds * 1000 };
    }
    this.become(this.trouble);
  }

  drop() {
    this.clearTimers();
    this.tries += 1;
    this.fault = null;
    this.silent = this.asked = false;
    if (this.socket === null) return;
    this.socket.onopen = this.socket.onmessage = this.socket.onclose = null;
    this.socket.close();
    this.socket = null;
  }

  clearTimers() {
    for (const timer of this.timers) clearTimeout(timer); // an interval's as well
    this.timers = [];
  }

  become(state) {
    this.state = state;
    this.heard.changed();
  }
}
