// The server's event stream, read with fetch: EventSource reports neither status nor reason, and does not reconnect after
// a 503. The server sends an event each second, so a silence is a lost connection as well.
const SILENCE = 5000; // milliseconds without data after which the connection is lost
const MAX_DELAY = 10; // seconds between attempts; short, since nobody reloads the page of a wall screen
const GOOD_AFTER = 60000; // milliseconds after which a connection resets the count of attempts

export class Feed {
  #url;
  #authorize;
  #listener;
  #attempts = 0;
  #timer;
  #abort;

  /**
   * *authorize()* is awaited before each attempt. *listener* is called with (event, data) for each event, and with
   * ("link", {up, reason, retryAt}) for each change of the connection.
   */
  constructor(url, authorize, listener) {
    this.#url = url;
    this.#authorize = authorize;
    this.#listener = listener;
    addEventListener("online", () => this.#connectIn(0));
    // A hidden page takes no place among the watchers, and none of the browser's six connections to this server.
    document.addEventListener("visibilitychange", () => (document.hidden ? this.#stop() : this.#connectIn(0)));
    if (!document.hidden) this.#connect();
  }

  /** Close the connection and connect again at once. */
  reconnect() {
    this.#connectIn(0);
  }

  #stop() {
    clearTimeout(this.#timer);
    this.#abort?.abort();
    this.#abort = undefined;
  }

  #connectIn(seconds) {
    this.#stop();
    this.#timer = setTimeout(() => this.#connect(), seconds * 1000);
  }

  async #connect() {
    const abort = new AbortController();
    this.#abort = abort;
    const started = performance.now();
    const failure = await this.#authorize()
      .then(() => this.#read(abort))
      .catch((error) => ({ reason: error.reason ?? "" }));
    if (this.#abort !== abort) return; // it was stopped, or another attempt has begun
    if (performance.now() - started > GOOD_AFTER) this.#attempts = 0;
    const jitter = Math.random() * Math.min(MAX_DELAY, 0.5 * 2 ** this.#attempts++);
    const delay = Math.max(0.3 + jitter, failure.after ?? 0);
    this.#connectIn(delay);
    this.#listener("link", { up: false, reason: failure.reason, retryAt: Date.now() + delay * 1000 });
  }

  /** Read events until the end. Returns the server's reason, if it gave one, and its Retry-After in seconds. */
  async #read(abort) {
    let watchdog;
    const restart = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => abort.abort(), SILENCE);
    };
    try {
      restart();
      const response = await fetch(this.#url, { signal: abort.signal, cache: "no-store" });
      if (!response.ok) return await rejection(response);
      this.#listener("link", { up: true });
      const parse = parser(this.#listener);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        restart();
        const { done, value } = await reader.read();
        if (done) return { reason: "" };
        parse(value);
      }
    } finally {
      clearTimeout(watchdog);
    }
  }
}

async function rejection(response) {
  const after = Math.min(60, Number(response.headers.get("Retry-After")) || 0);
  const body = await response.json().catch(() => null);
  return { reason: body?.error?.message ?? `HTTP ${response.status}`, after };
}

/** A parser of text/event-stream as the server writes it: lines end with LF or CRLF, the data of an event is JSON. */
function parser(listener) {
  let rest = "";
  let event = "";
  let data = [];
  return (chunk) => {
    const lines = (rest + chunk).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("event:")) event = line.slice(6).trim();
      else if (line.startsWith("data:")) data.push(line.slice(5));
      else if (line === "") {
        if (data.length) deliver(listener, event, data.join("\n"));
        event = "";
        data = [];
      }
    }
  };
}

/** An exception in the listener is an error of this page; it does not end the connection. */
function deliver(listener, event, data) {
  try {
    listener(event, JSON.parse(data));
  } catch (error) {
    reportError(error);
  }
}
