// The connection to the WebSocket face: it is opened, checked, and opened again after it was lost.
//
//     connecting → queued (the server is at capacity) → open → lost → connecting …
//                                                            → closed (until somebody opens it)
//
// Before the server has admitted the connection only a ping is sent; its pong says that it has.
// So a rejected connection never loses half of what it was to send.

const FIRST_WORD_WITHIN = 15_000; // milliseconds from an attempt to the server's first message
const CHECK_EVERY = 15_000; // silence of so long: a ping is sent; of twice as long: lost
const GOOD_AFTER = 60_000; // a connection that lasted so long resets the count of failures
const FINAL_CODES = new Set([1000, 1002, 1003, 1007, 1008, 1009]); // reconnecting would not help

// Returns the seconds to wait before attempt number *failures*, counted from 0; null: do not
// reconnect.
export function retryDelay(code, failures, retryAfter = 0) {
  if (FINAL_CODES.has(code)) return null;
  if (code === 1012) return 1 + 9 * Math.random(); // after a restart clients come one by one
  const jitter = Math.random() * Math.min(30, 0.5 * 2 ** failures);
  return code === 1013 ? Math.max(5, retryAfter) + jitter : jitter;
}

export class Connection {
  // `locate()` returns a promise of the address. The listener has changed(), opened(),
  // frame(frame), and two functions that return whether to reconnect at once: wanted(), after the
  // server closed an idle connection, and tooLarge(), after a message was too large.
  constructor(locate, listener) {
    this.locate = locate;
    this.listener = listener;
    this.state = { name: "connecting" };
    this.lastLoss = null; // the state in which the connection was lost, until it is open again
    this.failures = 0;
    this.socket = null;
    this.fault = null; // the server's error about the connection itself
    this.attempts = 0;
    this.timers = [];
    window.addEventListener("online", () => this.retryNow());
    document.addEventListener("visibilitychange", () => document.hidden || this.retryNow());
  }

  get open() {
    return this.state.name === "open";
  }

  async connect() {
    this.discard();
    this.setState({ name: "connecting", after: this.lastLoss });
    const attempt = this.attempts;
    let address;
    try {
      address = await this.locate();
    } catch {
      address = null;
    }
    if (attempt !== this.attempts) return; // another attempt has begun meanwhile
    if (address === null) {
      this.lose(1006);
      return;
    }
    this.socket = new WebSocket(address);
    this.socket.onopen = () => this.send({ action: "ping" });
    this.socket.onmessage = (message) => this.receive(JSON.parse(message.data));
    this.socket.onclose = (event) => this.lose(event.code);
    this.timers.push(setTimeout(() => this.lose(1006), FIRST_WORD_WITHIN));
  }

  // Start the next attempt at once, unless the server is at capacity.
  retryNow() {
    if (this.state.name === "lost" && this.state.code !== 1013) this.connect();
  }

  send(frame) {
    this.socket.send(JSON.stringify(frame));
  }

  receive(frame) {
    if (this.state.name === "connecting") this.clearTimers();
    this.silent = false;
    if (frame.status === "pong") {
      if (!this.open) this.admitted();
    } else if (frame.request_id !== null) {
      this.listener.frame(frame);
    } else if (frame.status === "queued") {
      this.setState({ name: "queued", ...frame.chunk });
    } else if (frame.status === "error") {
      this.fault = frame.chunk;
    }
  }

  admitted() {
    this.lastLoss = null;
    this.setState({ name: "open" });
    this.timers.push(
      setTimeout(() => (this.failures = 0), GOOD_AFTER),
      setInterval(() => this.check(), CHECK_EVERY),
    );
    this.listener.opened();
  }

  // A broken network path is not reported to a browser. After an interval without a message a ping
  // is sent; after a second one the connection is lost.
  check() {
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
    this.discard();
    const atOnce =
      (code === 1000 && this.listener.wanted()) ||
      (code === 1009 && this.listener.tooLarge()) ||
      (code === 1008 && fault?.code === "invalid_api_key"); // the login then asks for another key
    const seconds = atOnce ? 0 : retryDelay(code, this.failures, fault?.retry_after);
    if (seconds === null) {
      this.lastLoss = { name: "closed", code, fault };
    } else {
      this.failures += 1;
      this.timers.push(setTimeout(() => this.connect(), seconds * 1000));
      this.lastLoss = { name: "lost", code, fault, until: Date.now() + seconds * 1000 };
    }
    this.setState(this.lastLoss);
  }

  discard() {
    this.clearTimers();
    this.attempts += 1;
    this.fault = null;
    this.silent = this.asked = false;
    if (this.socket === null) return;
    this.socket.onopen = this.socket.onmessage = this.socket.onclose = null;
    this.socket.close();
    this.socket = null;
  }

  clearTimers() {
    for (const timer of this.timers) clearTimeout(timer); // clearTimeout ends intervals as well
    this.timers = [];
  }

  setState(state) {
    this.state = state;
    this.listener.changed();
  }
}
